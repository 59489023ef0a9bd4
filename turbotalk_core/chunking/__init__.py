"""Chunking: the frames that each sampling run makes, and those of them that the video keeps."""
