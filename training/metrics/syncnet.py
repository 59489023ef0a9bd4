"""Sync-C and Sync-D: lip synchronisation, measured by SyncNet.

Input: faces and sound of a clip, and the public weights. Output: the scores of the literature.
SyncNet and its audio front end are implemented here, because the packages that wrap it require
external programs and OpenCV. Several OpenCV packages overwrite each other in the environments of
ComfyUI users.

Axes: T video frames, C channels, H height, W width, S audio samples, N windows, K window length,
M sound frames, D embedding width.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.footage import cut_sound, read_sound
from training.data.scores import MOST_SHIFT, FaceDetector, SyncNetwork
from training.metrics.clips import Clip, check_features
from training.metrics.faces import cut_faces
from turbotalk_core.audio.resample import to_mono_16k
from turbotalk_core.errors import CheckpointError, GeometryError
from turbotalk_core.geometry import SAMPLE_RATE, count_samples

WIDTH = 1024
WINDOW_FRAMES = 5  # video frames; four times as many sound frames
SOUND_PER_FRAME = 4
BATCH = 20  # windows per network call

# Audio front end of SyncNet: mel-frequency cepstral coefficients as its authors computed them, with
# the defaults of python_speech_features 0.6.
SOUND_LENGTH = 400  # samples, 25 ms
SOUND_STEP = 160  # samples, 10 ms
NUM_BINS = 512  # of the Fourier transform
NUM_FILTERS = 26
NUM_COEFFICIENTS = 13
PREEMPHASIS = 0.97
LIFTER = 22
FULL_SCALE = 32768  # SyncNet was trained on the integers of 16-bit files


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncScores:
    """Lip sync scores of a clip.

    Attributes:
        sync_c: confidence, the median over all shifts of the mean distance, minus the least; more
            is better.
        sync_d: least mean distance of lip and voice embeddings over all shifts; less is better.
        offset: shift of the least distance, in video frames, positive if the voice is late.
            SyncNet's own program reports the opposite sign.
    """

    sync_c: float
    sync_d: float
    offset: int


class SyncNet(nn.Module):
    """Network of "Out of time", with parameter names of the public file.

    Source: Chung and Zisserman, Out of time: automated lip sync in the wild, 2016; layer sizes of
    syncnet_v2.
    """

    def __init__(self) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_convolve_sound(1, 64, 3, 1),
            nn.MaxPool2d(1, 1),
            *_convolve_sound(64, 192, 3, 1),
            nn.MaxPool2d(3, (1, 2)),
            *_convolve_sound(192, 384, 3, 1),
            *_convolve_sound(384, 256, 3, 1),
            *_convolve_sound(256, 256, 3, 1),
            nn.MaxPool2d(3, 2),
            *_convolve_sound(256, 512, (5, 4), 0),
        )
        self.netcnnlip = nn.Sequential(
            *_convolve_lips(3, 96, (5, 7, 7), 2, 0),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_convolve_lips(96, 256, (1, 5, 5), 2, 1),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_convolve_lips(256, 256, (1, 3, 3), 1, 1),
            *_convolve_lips(256, 256, (1, 3, 3), 1, 1),
            *_convolve_lips(256, 256, (1, 3, 3), 1, 1),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_convolve_lips(256, 512, (1, 6, 6), 1, 0),
        )
        self.netfcaud = _project()
        self.netfclip = _project()

    def forward(self, faces_TCHW: Tensor, waveform_S: Tensor) -> tuple[Tensor, Tensor]:
        """Embed lips and voice of windows that start one frame apart, without the last window.

        Args:
            faces_TCHW: [T, 3, 224, 224], RGB in [0, 1].
            waveform_S: sound of the same frames, 16 kHz.

        Returns:
            Lip embeddings and voice embeddings, both [N, 1024], at the same times.

        Raises:
            GeometryError: if there are too few frames for a window.
        """
        num_frames = min(len(faces_TCHW), len(waveform_S) // count_samples(1, SAMPLE_RATE))
        num_windows = num_frames - WINDOW_FRAMES
        if num_windows < 1:
            raise GeometryError(
                f"got {num_frames} frames with sound; SyncNet needs more than {WINDOW_FRAMES}"
            )
        device = next(self.parameters()).device
        lips_NCKHW = faces_TCHW.unfold(0, WINDOW_FRAMES, 1).permute(0, 1, 4, 2, 3)[:num_windows]
        mfcc_MD = mfcc(waveform_S).to(device)
        sounds_NDK = mfcc_MD.unfold(0, SOUND_PER_FRAME * WINDOW_FRAMES, SOUND_PER_FRAME)
        lip_parts = [
            # SyncNet was trained on OpenCV's channel order, BGR, in [0, 255].
            self.netfclip(self.netcnnlip(255 * batch.flip(1).to(device)).flatten(1))
            for batch in lips_NCKHW.split(BATCH)
        ]
        voice_parts = [
            self.netfcaud(self.netcnnaud(batch.unsqueeze(1)).flatten(1))
            for batch in sounds_NDK[:num_windows].split(BATCH)
        ]
        return torch.cat(lip_parts), torch.cat(voice_parts)


def _convolve_sound(
    width_in: int, width_out: int, kernel: int | tuple[int, int], padding: int
) -> Iterator[nn.Module]:
    yield nn.Conv2d(width_in, width_out, kernel, padding=padding)
    yield nn.BatchNorm2d(width_out)
    yield nn.ReLU()


def _convolve_lips(
    width_in: int, width_out: int, kernel: tuple[int, int, int], stride: int, padding: int
) -> Iterator[nn.Module]:
    strides, paddings = (1, stride, stride), (0, padding, padding)
    yield nn.Conv3d(width_in, width_out, kernel, strides, paddings)
    yield nn.BatchNorm3d(width_out)
    yield nn.ReLU()


def _project() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, WIDTH))


def load_syncnet(path: Path, device: torch.device) -> SyncNet:
    """Load the network.

    Args:
        path: the public file, a pickle of tensors.
        device: device of the network.

    Returns:
        The network, in evaluation mode.

    Raises:
        CheckpointError: if the file contains anything else.
    """
    network = SyncNet()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, OSError, RuntimeError, TypeError, EOFError) as error:
        raise CheckpointError(
            f"{path} does not hold the weights of SyncNet ({type(error).__name__}); download it "
            "again"
        ) from error
    return network.requires_grad_(False).eval().to(device)


def mfcc(waveform_S: Tensor) -> Tensor:
    """Compute mel-frequency cepstral coefficients; log energy replaces the first one.

    Args:
        waveform_S: 16 kHz, in [-1, 1].

    Returns:
        [M, 13] float32, a row every 10 ms; the end is padded with silence.

    Source: Davis and Mermelstein, 1980; settings of python_speech_features 0.6.
    """
    samples_S = (waveform_S.double().cpu() * FULL_SCALE).round()
    samples_S = torch.cat((samples_S[:1], samples_S[1:] - PREEMPHASIS * samples_S[:-1]))
    num_steps = max(0, math.ceil((len(samples_S) - SOUND_LENGTH) / SOUND_STEP))
    length = SOUND_LENGTH + num_steps * SOUND_STEP
    frames_MS = F.pad(samples_S, (0, length - len(samples_S))).unfold(0, SOUND_LENGTH, SOUND_STEP)
    power_MB = torch.fft.rfft(frames_MS, NUM_BINS).abs().square() / NUM_BINS
    least = torch.finfo(torch.float64).eps  # floor of the logarithm, for silence
    bands_MF = (power_MB @ _mel_filters().T).clamp_min(least).log()
    orders_D = torch.arange(NUM_COEFFICIENTS, dtype=torch.float64)
    middles_F = torch.arange(NUM_FILTERS, dtype=torch.float64) + 0.5
    cosines_FD = torch.cos(math.pi / NUM_FILTERS * middles_F[:, None] * orders_D)
    # The cosine transform is scaled to be orthonormal, except for its first row, which is replaced.
    lifter_D = 1 + LIFTER / 2 * torch.sin(math.pi / LIFTER * orders_D)
    cepstrum_MD = bands_MF @ cosines_FD * math.sqrt(2 / NUM_FILTERS) * lifter_D
    cepstrum_MD[:, 0] = power_MB.sum(1).clamp_min(least).log()
    return cepstrum_MD.float()


def _mel_filters() -> Tensor:
    """Return triangular filters on the mel scale, with corners at whole bins, [filters, bins]."""
    most_mel = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    mels_P = torch.linspace(0, most_mel, NUM_FILTERS + 2, dtype=torch.float64)
    hertz_P = 700 * (10 ** (mels_P / 2595) - 1)
    points_P = ((NUM_BINS + 1) * hertz_P / SAMPLE_RATE).floor()
    left_F1, middle_F1, right_F1 = (
        points_P[at : at + NUM_FILTERS, None].clone() for at in range(3)
    )
    bins_B = torch.arange(NUM_BINS // 2 + 1, dtype=torch.float64)
    rising_FB = (bins_B - left_F1) / (middle_F1 - left_F1)
    falling_FB = (right_F1 - bins_B) / (right_F1 - middle_F1)
    return torch.minimum(rising_FB, falling_FB).clamp_min(0)


def measure_sync(video_ND: Tensor, audio_ND: Tensor) -> SyncScores:
    """Compare lips with the voice at every shift.

    Unlike ``training.data.scores.score_sync``, all windows count at every shift, and voice
    embeddings past the ends of the clip are zero. SyncNet's own program does the same, so published
    numbers depend on it.

    Args:
        video_ND: embeddings of the lips, one per window.
        audio_ND: embeddings of the voice at the same times.

    Returns:
        The scores.

    Raises:
        GeometryError: if there are not more windows than shifts, so that padding would dominate.

    Source: Chung and Zisserman, syncnet_python, SyncNetInstance.py, evaluate.
    """
    num_windows = len(video_ND)
    if num_windows <= 2 * MOST_SHIFT:
        needed = 2 * MOST_SHIFT + 1 + WINDOW_FRAMES
        raise GeometryError(f"got {num_windows} windows; a clip needs {needed} frames with sound")
    padded_ND = F.pad(audio_ND, (0, 0, MOST_SHIFT, MOST_SHIFT))
    distances = torch.stack(
        [
            (video_ND - padded_ND[start : start + num_windows]).norm(dim=1).mean()
            for start in range(2 * MOST_SHIFT + 1)
        ]
    )
    least = distances.min()
    return SyncScores(
        sync_c=(distances.median() - least).item(),
        sync_d=least.item(),
        offset=int(distances.argmin()) - MOST_SHIFT,
    )


@torch.no_grad()
def score_clip(clip: Clip, syncnet: SyncNetwork, detector: FaceDetector) -> SyncScores:
    """Measure the lip sync of a clip.

    Args:
        clip: clip with sound.
        syncnet: SyncNet.
        detector: face detector.

    Returns:
        The scores.

    Raises:
        AudioError: if the clip has no sound.
        ImageError: if it is damaged, or no face can be tracked through it.
        GeometryError: if it is too short.
        CheckpointError: if the output of a network has the wrong form.
    """
    waveform_S = to_mono_16k(cut_sound(read_sound(clip.path), 0, clip.num_frames))
    video_ND, audio_ND = syncnet(cut_faces(clip, detector), waveform_S)
    return measure_sync(
        check_features(video_ND, len(video_ND), WIDTH, "SyncNet"),
        check_features(audio_ND, len(video_ND), WIDTH, "SyncNet"),
    )
