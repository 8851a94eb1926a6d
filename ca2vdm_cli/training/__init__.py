"""Training: the loss, the trainer, validation, and the run's folder on disk."""
