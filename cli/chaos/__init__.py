"""`baton chaos`: breaks a cluster on purpose under load whose answers are known, and says whether any was wrong."""
