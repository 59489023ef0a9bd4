"""Comparison of speed with ComfyUI's own InfiniteTalk nodes."""
