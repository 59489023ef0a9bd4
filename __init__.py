"""TurboTalk as a ComfyUI pack: shows the host our nodes, and is empty where there is no host."""

from importlib.util import find_spec

if __package__ and find_spec("comfy_api"):
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./nodes/web"  # holds docs/<node id>.md, which the host's help panel shows
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
