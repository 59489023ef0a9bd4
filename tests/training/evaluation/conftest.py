"""A small held-out clip and a family of random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.family import make_request
from tests.training.tiny_networks import SIZE, make_networks
from training.avatars.synthetic import SyntheticClip
from turbotalk_core.models.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.pipeline import Models
from turbotalk_core.request import TalkRequest

NUM_FRAMES = 26


REQUIRED = {  # scores of every evaluation
    "sync_correlation",
    "sync_lag_frames",
    "identity_error",
    "flicker",
    "psnr",
    "frechet",
    "motion_ratio",
    "edge_ratio",
    "unlikeness_ratio",
}


@pytest.fixture(scope="module")
def clip(draw_humming_clip: Callable[[str, int, int], SyntheticClip]) -> SyntheticClip:
    return draw_humming_clip("heldout", 3, NUM_FRAMES)


@pytest.fixture(scope="module")
def models() -> Models:
    model, projection, vae = make_networks()
    return Models(vae=vae, denoiser=WanDenoiser(model), adapter=ProjectionAdapter(projection))


@pytest.fixture
def settings() -> TalkRequest:
    return make_request(
        num_inference_steps=1,
        schedule="reference",
        shift=3.0,
        update="euler",
        height=SIZE,
        width=SIZE,
        chunk_frames=17,
        num_motion_frames=5,
    )
