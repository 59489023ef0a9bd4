"""The trainer, its roles, and the estimate of its memory."""
