"""Training of the embedded audio encoder, a wav2vec2 small enough for any machine.

A linear head on every transformer layer predicts the mouth shape and the spectrum at each video
frame, so the features encode at 25 Hz what determines the face. The heads are discarded afterwards.
The encoder's file is written with a log beside it. The command

    make models-audio-encoder

rebuilds the shipped file, bit for bit with the same seed, thread count and library versions.

Axes: B clips, S audio samples, T video frames, L encoder layers, D feature or target width.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torchaudio.functional as AF
from torch import Tensor, nn

from training.avatars.mouth import mouth_curve
from training.avatars.speech import draw_speech
from training.engine.optimizers import Optimizers, check_norm, rate_factor
from training.outputs import hold_files
from turbotalk_core.audio.loudness import normalize_loudness
from turbotalk_core.audio.wav2vec2 import EncoderConfig, Wav2Vec2Encoder, build_audio_encoder
from turbotalk_core.checkpoints.audio_encoder import save_audio_encoder
from turbotalk_core.cli.arguments import Parser, parse_threads, run
from turbotalk_core.errors import RequestError
from turbotalk_core.geometry import SAMPLE_RATE, count_frames, count_samples
from turbotalk_core.safe_io.atomic import write_text

TINY_CONFIG = EncoderConfig(
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=192,
    conv_dim=(48,) * 7,
    num_conv_pos_embeddings=32,
    num_conv_pos_embedding_groups=4,
)
NUM_CURVES = 2  # opening and width, the first targets of each frame
NUM_MELS = 40
MEL_WINDOW = 1024  # samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All settings that determine the trained encoder.

    Attributes:
        seed: seed of weights, speech and batches.
        num_clips: clips in the training pool.
        num_heldout: clips of held-out speech, for the correlation in the log.
        clip_seconds: length of each clip.
        silent_share: share of the pool that is silent throughout.
        pausing_share: share of the pool with a long pause. The first convolution is normalised over
            the whole clip, so the network must be trained on voices with any amount of silence.
        num_steps: number of batches.
        batch_size: clips per batch.
        learning_rate: peak, reached after a tenth of the steps; then a cosine down to 0.
        weight_decay: weight decay of AdamW.
        mel_weight: weight of the spectrum's error relative to the mouth's.

    Raises:
        RequestError: if a number is out of range.
    """

    seed: int = 0
    num_clips: int = 400
    num_heldout: int = 24
    clip_seconds: float = 4.0
    silent_share: float = 0.04
    pausing_share: float = 0.25
    num_steps: int = 1200
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    mel_weight: float = 0.5

    def __post_init__(self) -> None:
        if min(self.num_clips, self.num_steps) < 1 or self.seed < 0:
            raise RequestError(
                f"got {self.num_clips} clips, {self.num_steps} steps and the seed {self.seed}; "
                "clips and steps are 1 or more, the seed 0 or more"
            )


class Clips(NamedTuple):
    """Inputs of the encoder, and the targets of the heads for each video frame.

    Attributes:
        waveforms_BS: 16 kHz samples with normalised loudness.
        targets_BTD: opening, width and log-mel bands.
    """

    waveforms_BS: Tensor
    targets_BTD: Tensor


class Report(NamedTuple):
    """Progress of a training.

    Attributes:
        step: batches so far.
        loss: mean loss since the last report.
        correlation: correlation of the mouth opening predicted from the last layer with the true
            one, for held-out speech.
        seconds: time since the start of the training.
    """

    step: int
    loss: float
    correlation: float
    seconds: float


def make_clips(waveforms: list[Tensor]) -> Clips:
    """Prepare sounds of equal length for training.

    Args:
        waveforms: mono samples [S] at 16 kHz.

    Returns:
        The clips, one per sound.
    """
    num_frames = count_frames(waveforms[0].shape[0], SAMPLE_RATE)
    normalized_BS = torch.stack([normalize_loudness(waveform_S) for waveform_S in waveforms])
    curves = [mouth_curve(waveform_S, num_frames=num_frames) for waveform_S in waveforms]
    curves_BTD = torch.stack(
        [torch.stack([curve.opening_T, curve.width_T], dim=1) for curve in curves]
    )
    return Clips(normalized_BS, torch.cat([curves_BTD, _log_mel(normalized_BS, num_frames)], dim=2))


def draw_clips(split: str, num_clips: int, recipe: Recipe) -> Clips:
    """Draw speech, some of it with long pauses, and some silence.

    Args:
        split: split of the speech, ``train`` or ``heldout``; held-out clips have no added silence.
        num_clips: number of clips.
        recipe: recipe with seed, length and shares.

    Returns:
        The clips.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    waveforms = []
    for index in range(num_clips):
        kind, start, length = torch.rand(3, generator=generator).tolist()
        if split == "heldout":
            kind = 1.0
        if kind < recipe.silent_share:
            waveforms.append(torch.zeros(round(SAMPLE_RATE * recipe.clip_seconds)))
            continue
        # Pools are far smaller than a million clips, so seeds of different recipes do not overlap.
        waveform_S = draw_speech(split, recipe.seed * 1_000_000 + index, recipe.clip_seconds)
        if kind < recipe.silent_share + recipe.pausing_share:
            num_samples = waveform_S.shape[0]
            pause = int((0.25 + 0.5 * length) * num_samples)
            # Half of the pauses are at the start or the end of the clip.
            first = int((2 * start - 0.5) * (num_samples - pause))
            first = min(max(first, 0), num_samples - pause)
            waveform_S[first : first + pause] = 0
        waveforms.append(waveform_S)
    return make_clips(waveforms)


def train_encoder(
    clips: Clips, heldout: Clips, recipe: Recipe, report: Callable[[Wav2Vec2Encoder, Report], None]
) -> Wav2Vec2Encoder:
    """Train a new encoder.

    Args:
        clips: the training pool.
        heldout: held-out speech for measurement only.
        recipe: all settings.
        report: called with the encoder and the progress about twenty times, the last time at the
            end.

    Returns:
        The encoder, in evaluation mode.
    """
    encoder = build_audio_encoder(TINY_CONFIG, seed=recipe.seed)
    mean_D = clips.targets_BTD.mean(dim=(0, 1))
    std_D = clips.targets_BTD.std(dim=(0, 1)).clamp(min=1e-4)
    targets_BTD = (clips.targets_BTD - mean_D) / std_D
    num_frames, num_targets = targets_BTD.shape[1:]
    heads = _build_heads(encoder, num_targets, recipe.seed)
    both = nn.ModuleDict({"encoder": encoder.model, "heads": heads})
    optimizers = Optimizers(
        dict(both.named_parameters()),
        rate=recipe.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=recipe.weight_decay,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    interval = max(1, recipe.num_steps // 20)
    losses: list[float] = []
    began = time.monotonic()
    for step in range(1, recipe.num_steps + 1):
        picked_B = torch.randint(len(clips.waveforms_BS), (recipe.batch_size,), generator=generator)
        predicted_LBTD = _predict(encoder, heads, clips.waveforms_BS[picked_B], num_frames)
        loss = _loss(predicted_LBTD, targets_BTD[picked_B], recipe.mel_weight)
        loss.backward()
        factor = rate_factor(
            step - 1,
            recipe.num_steps,
            num_warmup_steps=max(1, recipe.num_steps // 10),
            floor=0.0,
            reaches_floor=True,
        )
        check_norm(optimizers.step(factor, limit=1.0))
        losses.append(loss.item())
        if step % interval == 0 or step == recipe.num_steps:
            correlation = _measure_opening(encoder, heads, heldout)
            mean_loss = sum(losses) / len(losses)
            report(encoder, Report(step, mean_loss, correlation, time.monotonic() - began))
            losses.clear()
    encoder.model.eval()
    return encoder


def _build_heads(encoder: Wav2Vec2Encoder, num_targets: int, seed: int) -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(
            nn.Linear(encoder.width, num_targets) for _ in range(encoder.num_layers)
        )


def _predict(
    encoder: Wav2Vec2Encoder, heads: nn.ModuleList, waveforms_BS: Tensor, num_frames: int
) -> Tensor:
    states = encoder.hidden_states(waveforms_BS, num_frames)
    return torch.stack([head(state_BTD) for head, state_BTD in zip(heads, states[1:], strict=True)])


def _loss(predicted_LBTD: Tensor, targets_BTD: Tensor, mel_weight: float) -> Tensor:
    error_D = (predicted_LBTD - targets_BTD).square().mean(dim=(0, 1, 2))
    return error_D[:NUM_CURVES].mean() + mel_weight * error_D[NUM_CURVES:].mean()


@torch.no_grad()
def _measure_opening(encoder: Wav2Vec2Encoder, heads: nn.ModuleList, heldout: Clips) -> float:
    predicted_LBTD = torch.cat(
        [
            _predict(encoder, heads, waveform_S[None], heldout.targets_BTD.shape[1])
            for waveform_S in heldout.waveforms_BS
        ],
        dim=1,
    )
    openings = torch.stack(
        [predicted_LBTD[-1, ..., 0].flatten(), heldout.targets_BTD[..., 0].flatten()]
    )
    return torch.corrcoef(openings)[0, 1].item()


def _log_mel(waveforms_BS: Tensor, num_frames: int) -> Tensor:
    """Compute log-mel energies around the time of each video frame, t / 25 s: [B, T, NUM_MELS]."""
    hop = count_samples(1, SAMPLE_RATE)
    spectrum = torch.stft(
        waveforms_BS,
        MEL_WINDOW,
        hop_length=hop,
        window=torch.hann_window(MEL_WINDOW),
        pad_mode="constant",
        return_complex=True,
    )
    filters = AF.melscale_fbanks(MEL_WINDOW // 2 + 1, 60.0, 7600.0, NUM_MELS, SAMPLE_RATE)
    power_BTD = spectrum.abs().square().transpose(1, 2)[:, :num_frames] @ filters
    return (power_BTD + 1e-3).log()


def main(arguments: list[str] | None = None) -> int:
    """Run the training from the command line; returns the exit code."""
    default = Recipe()
    parser = Parser(prog="python -m training.tiny.audio_encoder", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--num-clips", type=int, default=default.num_clips)
    parser.add_argument("--num-steps", type=int, default=default.num_steps)
    parser.add_argument(
        "--threads", type=parse_threads, default=2, help="CPU threads; part of the recipe"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return run(lambda: _train(options))


def _train(options: argparse.Namespace) -> None:
    log_file = options.out.with_suffix(".json")
    if options.out.suffix != ".safetensors":
        raise RequestError(f"got --out {options.out}; its name must end in .safetensors")
    with hold_files(options.out, log_file):
        _train_and_write(options, log_file)


def _train_and_write(options: argparse.Namespace, log_file: Path) -> None:
    recipe = Recipe(seed=options.seed, num_clips=options.num_clips, num_steps=options.num_steps)
    settings = {"kind": "audio_encoder", "threads": options.threads, "recipe": asdict(recipe)}
    reports: list[Report] = []

    def save(encoder: Wav2Vec2Encoder, report: Report) -> None:
        reports.append(report)
        sys.stdout.write(
            f"step {report.step}/{recipe.num_steps}  loss {report.loss:.4f}  held-out opening "
            f"{report.correlation:.4f}  {report.seconds:.0f} s\n"
        )
        sys.stdout.flush()
        save_audio_encoder(encoder, options.out, {"turbotalk": json.dumps(settings)})
        log = {**settings, "reports": [entry._asdict() for entry in reports]}
        write_text(log_file, json.dumps(log, indent=1) + "\n")

    sys.stdout.write(f"drawing {recipe.num_clips} clips\n")
    sys.stdout.flush()
    clips = draw_clips("train", recipe.num_clips, recipe)
    heldout = draw_clips("heldout", recipe.num_heldout, recipe)
    train_encoder(clips, heldout, recipe, save)


if __name__ == "__main__":
    sys.exit(main())
