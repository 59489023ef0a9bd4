"""Whole videos: every chunk from its noise to its frames."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.golden.conftest import FindWeights
from tests.golden.figures import Golden
from tests.golden.networks import build_dit, build_vae
from turbotalk_core.conditioning.reference import prepare_reference
from turbotalk_core.conditioning.regions import box_mask, fit_regions, halve_picture
from turbotalk_core.geometry import SPATIAL_STRIDE, cover_size
from turbotalk_core.models.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.models.image_encoder import build_image_encoder
from turbotalk_core.pipeline import Models, generate, plan_video
from turbotalk_core.protocols import Denoiser, VideoVAE
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import AudioFeatures, AudioTokens, Conditioning, Speech, Waveform

LEVEL = 2 / 255  # of 8-bit pixels in [-1, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Two networks that note what they are given and what they answer.

    Each chunk is checked from the reference's own motion latents on: random weights make rounding
    errors five times larger per chunk, and after four chunks they would be all that is compared.
    """

    golden: Golden
    denoiser: Denoiser
    vae: VideoVAE
    calls: list[tuple[Tensor, float, Conditioning]] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)
    decoded: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(
        self, latents_BCFHW: Tensor, sigma: float, conditioning: Conditioning, tokens: AudioTokens
    ) -> Tensor:
        self.calls.append((latents_BCFHW[0], sigma, conditioning))
        self.velocities.append(self.denoiser(latents_BCFHW, sigma, conditioning, tokens)[0])
        return self.velocities[-1].unsqueeze(0)

    def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
        return self.vae.encode_reference(picture_BCHW, num_frames)

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        latents_BCFHW = self.vae.encode(frames_BCTHW)
        name = f"chunk{len(self.decoded)}.motion_latent"
        if name not in self.golden:
            return latents_BCFHW
        self.golden.expect(name, latents_BCFHW[0])
        return self.golden[name].unsqueeze(0)

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        frames_BCTHW = self.vae.decode(latents_BCFHW)
        self.decoded.append((latents_BCFHW[0], frames_BCTHW[0]))
        return frames_BCTHW


def test_equals_the_reference(golden: Golden, find_weights: FindWeights) -> None:
    request = _read_request(golden)
    recorder, models = _build(golden, find_weights)
    pictures = [_prepare_in_8_bits(frame, request) for frame in golden["in.frames"]]
    if "cond_image" in golden:
        golden.expect("cond_image", pictures[0][0])
    ours = prepare_reference(golden["in.frames"][0].float() / 255, request.height, request.width)
    assert (ours - pictures[0]).abs().max() < LEVEL
    regions_PHW = _read_regions(golden, request)
    if regions_PHW is not None and "ref_target_masks" in golden:
        golden.expect("ref_target_masks", regions_PHW)

    speeches = _read_speeches(golden)
    chunks = list(generate(request, pictures, speeches, models, regions_PHW=regions_PHW))
    video = torch.cat([chunk.frames_BCTHW for chunk in chunks], 2)[0]
    plan = plan_video(request, speeches)
    assert len(plan.chunks) == golden.settings["chunks"]
    picked = [min(chunk.start, len(pictures) - 1) for chunk in plan.chunks]
    assert golden["picked_frames"].tolist()[: len(picked)] == picked
    for index in range(len(chunks)):
        _check_chunk(golden, index, request, recorder)
    golden.expect("out.video", video)


def _check_chunk(golden: Golden, index: int, request: TalkRequest, recorder: Recorder) -> None:
    num_chunks = golden.settings["chunks"]
    calls_per_chunk = len(recorder.calls) // num_chunks
    start = index * calls_per_chunk
    calls = recorder.calls[start : start + calls_per_chunk]
    first, last = calls[0], calls[-1]
    velocities = recorder.velocities[start : start + calls_per_chunk // request.num_inference_steps]
    assert first[2].image_embeds_BND is not None
    latents, frames = recorder.decoded[index]
    results = {
        "t": torch.tensor([1000 * sigma for _, sigma, _ in calls]),
        "latent": latents,
        "y": first[2].reference_BCFHW[0],
        "clip_fea_first4": first[2].image_embeds_BND[:, :4],
        "x_first_call": first[0],
        "x_last_call": last[0],
        "v_step0": torch.stack(velocities),
        "decoded": frames,
    }
    figures = {
        name: golden[f"chunk{index}.{name}"] for name in results if f"chunk{index}.{name}" in golden
    }
    # Without guidance the reference calls the network a second time to no effect.
    if golden.settings["calls_per_chunk"] != calls_per_chunk:
        assert request.guidance_scale == request.audio_guidance_scale == 1
        results["t"] = results["t"].repeat_interleave(2)
        if "v_step0" in figures:
            results["v_step0"] = torch.cat((results["v_step0"], figures["v_step0"][1:]))
    golden.expect_known({f"chunk{index}.{name}": result for name, result in results.items()})
    noise = golden[f"chunk{index}.noise"]
    num_given = int((noise != first[0]).flatten(2).any(2).any(0).sum())
    assert torch.equal(first[0][:, num_given:], noise[:, num_given:])


def _read_request(golden: Golden) -> TalkRequest:
    told = golden.settings
    _, _, rows, columns = golden["chunk0.noise"].shape
    return TalkRequest(
        num_inference_steps=told["steps"],
        schedule="reference",
        shift=told["shift"],
        update="euler",
        seed=told["seed"],
        height=rows * SPATIAL_STRIDE,
        width=columns * SPATIAL_STRIDE,
        guidance_scale=told["text_scale"],
        audio_guidance_scale=told["audio_scale"],
        chunk_frames=told["frame_num"],
        num_motion_frames=told["motion"],
        uses_apg=told["apg"],
        color_strength=told["color"],
        max_frames=told["max_frames"],
        follows_reference=True,
    )


def _build(golden: Golden, find_weights: FindWeights) -> tuple[Recorder, Models]:
    model, projection = build_dit(find_weights("dit_weights", golden.settings.get("config")))
    clip = find_weights("clip_tiny")
    told = golden.settings
    recorder = Recorder(
        golden=golden,
        denoiser=WanDenoiser(
            model, teacache_threshold=told["teacache_thresh"] if told["teacache"] else None
        ),
        vae=build_vae(find_weights("vae_weights")),
    )
    models = Models(
        vae=recorder,
        denoiser=recorder,
        adapter=ProjectionAdapter(projection),
        text_BND=golden["in.context"].unsqueeze(0),
        null_text_BND=golden["in.context_null"].unsqueeze(0),
        image_encoder=build_image_encoder(clip.under("w."), clip.settings["config"]["heads"]),
    )
    return recorder, models


def _read_speeches(golden: Golden) -> list[Speech]:
    names = sorted(name for name in golden.tensors if re.fullmatch(r"in\.audio_emb\d+", name))
    assert len(names) == golden.settings["humans"]
    silence = Waveform(samples_CS=torch.zeros(1, 1), sample_rate=16_000)
    return [
        Speech(
            features=AudioFeatures(features_TLD=golden[name], num_frames=len(golden[name])),
            waveform=silence,
        )
        for name in names
    ]


def _read_regions(golden: Golden, request: TalkRequest) -> Tensor | None:
    if golden.settings["humans"] == 1:
        return None
    height, width = golden["in.frames"].shape[1:3]
    size, boxes = (height, width), golden.settings["bbox"]
    if boxes is None:
        masks = halve_picture(size)
    else:
        listed: list[Any] = list(boxes.values()) if isinstance(boxes, dict) else boxes
        masks = [box_mask(size, *(int(edge) for edge in box)) for box in listed]
    return fit_regions(masks, request.height, request.width)


def _prepare_in_8_bits(frame_HWC: Tensor, request: TalkRequest) -> Tensor:
    """Prepare a picture as the reference does: Pillow rounds to 8 bits where we do not."""
    rows, columns = frame_HWC.shape[:2]
    height, width = cover_size(rows, columns, request.height, request.width)
    image = Image.fromarray(frame_HWC.numpy()).resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32))
    top, left = (height - request.height) // 2, (width - request.width) // 2
    cut = pixels[top : top + request.height, left : left + request.width]
    return (cut.permute(2, 0, 1) / 255 * 2 - 1).unsqueeze(0)
