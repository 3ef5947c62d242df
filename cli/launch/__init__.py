"""Local clusters: the processes of `baton up`, where they compute, and their restarts."""
