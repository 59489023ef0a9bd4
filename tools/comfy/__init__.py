"""ComfyUI for the demo, the tests and the comparison: download, server, and in this process."""
