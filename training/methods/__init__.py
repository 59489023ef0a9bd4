"""Training methods, each in a file of its own."""
