"""Audio: reading, resampling, loudness, and audio features with one row per video frame."""
