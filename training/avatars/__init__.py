"""Drawn people and their speech: the synthetic training data."""
