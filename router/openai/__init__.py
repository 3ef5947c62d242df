"""OpenAI's Chat Completions, Completions and Embeddings APIs, with vLLM's additions: bodies and answers."""
