"""Video files: takes (lossless, chunk by chunk), finished videos, and the reading of videos."""
