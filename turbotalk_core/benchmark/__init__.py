"""The ``bench`` command: time and memory of a chunk."""
