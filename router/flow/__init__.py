"""The life of one sequence from arrival to its outcome, pure: a planner runs it."""
