"""Training: the loss, the trainer and everything that a run keeps on disk."""
