"""Takes: unfinished or finished videos on disk that can be resumed."""
