"""Programs for developers: the demo, ComfyUI to run it in, and the comparison with it."""
