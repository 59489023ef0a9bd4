"""Optimizers, checkpoints, logs and ranks: what every training run needs."""
