"""Move KV blocks once, whole or not at all. Knows no model."""
