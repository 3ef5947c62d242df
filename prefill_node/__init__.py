"""Run prompts and hand their KV off."""
