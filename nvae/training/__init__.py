"""Training: the Lightning module, its optimiser and schedule, callbacks, the run's folder."""
