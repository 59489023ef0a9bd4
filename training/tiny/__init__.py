"""Training of the embedded VAE and audio encoder."""
