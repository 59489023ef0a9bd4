"""Frames and sound into files and back: takes (lossless, chunk by chunk) and finished videos."""
