"""Which cluster for a workload: tries designs in simulated time and finds the best within budgets."""
