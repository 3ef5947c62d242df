"""Local clusters: the processes of `baton up`, their GPUs and cores, and their restarts."""
