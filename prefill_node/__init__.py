"""The prompt phase: computes prompts and hands their KV off."""
