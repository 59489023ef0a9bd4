"""Sampling from noise to clean latents: noise levels, conversions, update rules, guidance."""
