"""ComfyUI behind the core's protocols."""
