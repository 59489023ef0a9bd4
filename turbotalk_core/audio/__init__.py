"""The audio room: a file or samples in, what the encoder hears per video frame out."""
