"""A pack for the tests' server: text and image encoders that any file will do for.

ComfyUI knows umT5 and CLIP vision in their real sizes only, gigabytes each. Here their loaders give
encoders without weights, so that a workflow which names the real files can run unchanged. What
these make has the right shape and follows from text and picture, and that is all.
"""

import comfy.clip_vision
import comfy.sd
import torch

TEXT_DIM = 16  # of the random family
IMAGE_TOKENS, IMAGE_DIM = 257, 1280  # CLIP ViT-H/14

NODE_CLASS_MAPPINGS = {}


class Text:
    """Stands in for a CLIP."""

    def tokenize(self, text, **_):
        return text

    def encode_from_tokens_scheduled(self, text, **_):
        generator = torch.Generator().manual_seed(len(text))
        return [[torch.randn(1, 8, TEXT_DIM, generator=generator), {}]]


class Picture:
    """Stands in for a CLIP_VISION."""

    def encode_image(self, image, crop=True):
        output = comfy.clip_vision.Output()
        mean = image.mean().item()
        output["penultimate_hidden_states"] = torch.full((1, IMAGE_TOKENS, IMAGE_DIM), mean)
        return output


comfy.sd.load_clip = lambda *_, **__: Text()
comfy.clip_vision.load = lambda *_, **__: Picture()
