"""Motion of an avatar, except for its mouth.

Most of it is independent of the sound: head, gaze, blinks, brows and breath follow from the motion
seed alone, so they cannot be predicted from the audio. Nods, brow lifts and hands also follow the
slow energy of speech. Heads stay within a few pixels of their start, like a newsreader's: for the
embedded transformer a picture has only 64 patches, and it breaks up a face that moves across them.
This module draws numbers, no pictures.

Axes: T video frames.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from training.avatars.avatars import Avatar
from training.avatars.seeds import open_stream
from turbotalk_core.geometry import FPS

BLINK_FRAMES = 3.2  # Half length of a blink: 0.26 s in all, as in people.


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """Motion curves over video frames. Lengths are in head units, half a head's height.

    Attributes:
        head_x_T: head position to the right.
        head_y_T: head position downwards.
        roll_T: tilt of the head, radians, clockwise.
        yaw_T: turn of the head to the right, about -1 to 1.
        pitch_T: nod downwards, about -1 to 1.
        lids_T: eyelids, 0 shut to 1 open.
        gaze_x_T: gaze to the right, -1 to 1.
        gaze_y_T: gaze downwards, -1 to 1.
        brow_T: brow lift, about -0.5 to 1.
        body_x_T: shoulder position to the right.
        body_y_T: shoulder position downwards, from breath.
        sway_T: displacement of loose hair to the right, which lags behind the head.
        hand_x_T: hand position to the right.
        hand_y_T: hand position downwards.
        hand_roll_T: rotation of the hand, radians, clockwise.
    """

    head_x_T: Tensor
    head_y_T: Tensor
    roll_T: Tensor
    yaw_T: Tensor
    pitch_T: Tensor
    lids_T: Tensor
    gaze_x_T: Tensor
    gaze_y_T: Tensor
    brow_T: Tensor
    body_x_T: Tensor
    body_y_T: Tensor
    sway_T: Tensor
    hand_x_T: Tensor
    hand_y_T: Tensor
    hand_roll_T: Tensor

    def select(self, start: int, stop: int) -> Motion:
        """Return the frames `[start, stop)`."""
        return Motion(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})


def draw_motion(avatar: Avatar, split: str, seed: int, num_frames: int, energy_T: Tensor) -> Motion:
    """Draw the motion of an avatar.

    A longer motion of the same seed begins with the shorter one.

    Args:
        avatar: the avatar.
        split: `train` or `heldout`.
        seed: seed of the motion, 0 or more.
        num_frames: number of video frames.
        energy_T: mouth opening, `[num_frames]`, from which gestures of speech follow.

    Returns:
        Curves of `num_frames` values, float32.

    Raises:
        RequestError: if the split is unknown or the seed negative.
    """
    rng = open_stream(split, seed, "motion")
    lively = avatar.liveliness
    slow = _smooth_gauss(energy_T.double().numpy(), 4.0)
    waves = {
        name: _wave(rng, num_frames, low, high)
        for name, low, high in (
            ("x", 0.1, 0.5), ("y", 0.12, 0.5), ("roll", 0.1, 0.5), ("yaw", 0.1, 0.5),
            ("pitch", 0.15, 0.7), ("brow", 0.1, 0.5), ("body", 0.1, 0.3),
            ("hand_x", 0.2, 0.7), ("hand_y", 0.2, 0.7), ("hand_roll", 0.2, 0.7),
        )
    }  # fmt: skip
    breath = np.sin(
        2 * np.pi * (rng.uniform(0.22, 0.35) * np.arange(num_frames) / FPS + rng.random())
    )
    nod, lift, wave_up = rng.uniform(0.1, 0.35), rng.uniform(0.1, 0.6), rng.uniform(0.4, 0.9)
    head_x = 0.030 * lively * waves["x"]
    yaw = 0.25 * lively * waves["yaw"]
    body_x = 0.3 * head_x + 0.020 * lively * waves["body"]
    gaze_x, gaze_y = _saccades(open_stream(split, seed, "gaze"), num_frames)
    curves = {
        "head_x_T": head_x,
        "head_y_T": 0.015 * lively * waves["y"] + 0.005 * breath,
        "roll_T": 0.025 * lively * waves["roll"],
        "yaw_T": yaw,
        "pitch_T": 0.20 * lively * waves["pitch"] + nod * (slow - 0.4),
        "lids_T": _blinks(open_stream(split, seed, "blinks"), num_frames),
        "gaze_x_T": gaze_x,
        "gaze_y_T": gaze_y,
        "brow_T": 0.30 * waves["brow"] + lift * slow,
        "body_x_T": body_x,
        "body_y_T": 0.022 * breath,
        # A lag of about half a second behind the head, because loose hair follows it.
        "sway_T": _follow(body_x - head_x - 0.05 * yaw, 6),
        "hand_x_T": 0.16 * waves["hand_x"] - 0.10 * wave_up * slow,
        "hand_y_T": 0.13 * waves["hand_y"] - 0.55 * wave_up * slow,
        "hand_roll_T": 0.14 * waves["hand_roll"] + 0.25 * slow,
    }
    return Motion(**{name: torch.from_numpy(c.astype(np.float32)) for name, c in curves.items()})


def _wave(rng: np.random.Generator, num_frames: int, low: float, high: float) -> np.ndarray:
    """Return a smooth random curve of unit power: four sines, with less power at higher rates."""
    hertz = np.exp(rng.uniform(np.log(low), np.log(high), 4))
    height = hertz**-0.7
    phase = rng.uniform(0, 2 * np.pi, 4)
    seconds = np.arange(num_frames)[:, None] / FPS
    sines = height * np.sin(2 * np.pi * hertz * seconds + phase)
    return sines.sum(1) / np.sqrt(np.sum(height**2) / 2)


def _blinks(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """Return lids that shut every two to five seconds, sometimes twice."""
    lids, frames = np.ones(num_frames), np.arange(num_frames)
    centre = rng.uniform(-40, 70)
    while centre < num_frames + BLINK_FRAMES:
        nearness = np.clip(1 - np.abs(frames - centre) / BLINK_FRAMES, 0, 1)
        lids = np.minimum(
            lids, 1 - np.minimum(1.0, 1.35 * nearness * nearness * (3 - 2 * nearness))
        )
        centre += rng.uniform(9, 12) if rng.random() < 0.12 else rng.uniform(38, 120)
    return lids


def _saccades(rng: np.random.Generator, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a gaze that rests mostly near the camera and jumps within two frames."""
    frames = np.arange(num_frames)
    gaze = np.zeros((2, num_frames))
    at, now = float(rng.uniform(-30, 30)), np.zeros(2)
    while at < num_frames:
        target = np.zeros(2) if rng.random() < 0.45 else rng.uniform(-1, 1, 2) * (1.0, 0.6)
        share = np.clip((frames - at) / 2.0, 0, 1)
        gaze += (target - now)[:, None] * share
        at, now = at + rng.uniform(14, 60), target
    return gaze[0], gaze[1]


def _smooth_gauss(curve: np.ndarray, sigma: float) -> np.ndarray:
    reach = int(4 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(curve, reach, mode="edge")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid")


def _follow(target: np.ndarray, frames: float) -> np.ndarray:
    """Filter a curve with a first-order lag."""
    followed, state = np.empty_like(target), target[0]
    for index, value in enumerate(target):
        state += (value - state) / frames
        followed[index] = state
    return followed
