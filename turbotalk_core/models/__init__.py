"""The networks: video transformer, audio adapter, video VAE, text and image encoders."""
