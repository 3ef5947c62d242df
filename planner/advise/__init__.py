"""Says from what a running cluster exports which change of it would pay, by simulating today's and its neighbours."""
