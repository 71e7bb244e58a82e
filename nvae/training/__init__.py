"""Training: the Lightning module, its optimizer and schedule, callbacks, the run's folder."""
