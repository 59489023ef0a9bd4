"""Networks in training: batches, LoRA, and the transformer with its adapter."""
