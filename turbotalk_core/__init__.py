"""TurboTalk's core: a talking video from a portrait and a voice. Imports nothing of ComfyUI."""
