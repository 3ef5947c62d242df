"""The compat profile: what the Splitwise paper's public simulator would say, its known errors included."""
