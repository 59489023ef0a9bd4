"""ComfyUI pack TurboTalk: exports the nodes if ComfyUI is installed, and nothing otherwise."""

from importlib.util import find_spec

if __package__ and find_spec("comfy_api"):
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./nodes/web"  # contains docs/<node id>.md for the host's help panel
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
