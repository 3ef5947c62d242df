"""Text to token ids and back: chat template, tokenizer, and what a model's output says piece by piece."""
