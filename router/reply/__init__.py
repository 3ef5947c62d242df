"""Reads a model's output as reasoning, text and tool calls, in the format that the model was trained on."""
