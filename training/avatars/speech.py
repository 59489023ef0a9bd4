"""Synthetic speech: sentences of espeak-ng in many voices, sometimes degraded like poor recordings.

Input: a split and a seed. Output: mono sound at 16 kHz. Only this module needs the espeak-ng
program.
"""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import torch
from scipy import signal
from torch import Tensor

from training.avatars.seeds import open_stream
from training.avatars.vocabulary import WORDS
from turbotalk_core.audio.resample import resample
from turbotalk_core.errors import AudioError, MissingToolError
from turbotalk_core.geometry import SAMPLE_RATE

# Accents of one language use the same words.
_VOICES = {
    "en": ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-us-nyc"),
    "de": ("de",),
    "fr": ("fr-fr", "fr-be"),
    "es": ("es", "es-419"),
    "it": ("it",),
    "pt": ("pt", "pt-br"),
    "nl": ("nl",),
    "pl": ("pl",),
    "sv": ("sv",),
    "fi": ("fi",),
    "tr": ("tr",),
    "id": ("id",),
}
_VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5"),
    *("Alex", "Alicia", "Andrea", "Annie", "belinda", "benjamin", "david", "ed", "edward"),
    *("Gene", "Henrique", "Hugo", "john", "Lee", "linda", "Marco", "max", "michael", "Mike"),
    *("paul", "pedro", "rob", "robert", "steph", "steph2", "victor", "zac", "anika", "shelby"),
)


def draw_speech(split: str, seed: int, seconds: float) -> Tensor:
    """Draw an utterance.

    Voice, language, speed, pitch, sentences, pauses and recording conditions follow from split and
    seed alone. The splits have different words.

    Args:
        split: `train` or `heldout`.
        seed: 0 or more.
        seconds: target length, positive.

    Returns:
        float32 `[round(SAMPLE_RATE * seconds)]` within [-1, 1].

    Raises:
        AudioError: if the length is not positive, or espeak-ng produced no sound.
        MissingToolError: if espeak-ng is not installed.
        RequestError: if the split is unknown or the seed negative.
    """
    length = round(SAMPLE_RATE * seconds)
    if length < 1:
        raise AudioError(f"got {seconds} seconds of speech; ask for more than 0")
    rng = open_stream(split, seed, "speech")
    language = str(rng.choice(list(WORDS), p=_language_shares()))
    voice = f"{rng.choice(_VOICES[language])}+{rng.choice(_VARIANTS)}"
    settings = (int(rng.integers(115, 205)), int(rng.integers(20, 80)))
    clean = _speak_until(
        rng, length, words=WORDS[language].of(split), voice=voice, settings=settings
    )
    return torch.from_numpy(_degrade(rng, clean).astype(np.float32))


def _language_shares() -> list[float]:
    """Return the shares of the languages: one half for English, the rest divided equally."""
    return [0.5 if name == "en" else 0.5 / (len(WORDS) - 1) for name in WORDS]


def _speak_until(
    rng: np.random.Generator,
    length: int,
    *,
    words: tuple[str, ...],
    voice: str,
    settings: tuple[int, int],
) -> np.ndarray:
    """Synthesise sentences with pauses between them, exactly `length` samples."""
    pieces = [np.zeros(int(SAMPLE_RATE * rng.uniform(0.04, 0.4)))]
    total = len(pieces[0])
    while total < length:
        # About as many words as fit, to avoid synthesising speech that is then cut off.
        fitting = 1 + int(2.8 * (length - total) / SAMPLE_RATE)
        count = int(min(rng.integers(3, 12), fitting + 1))
        spoken = _speak(_write_sentence(rng, words, count), voice, *settings)
        pause = np.zeros(int(SAMPLE_RATE * rng.uniform(0.12, 0.6)))
        pieces += [spoken, pause]
        total += len(spoken) + len(pause)
    sound = np.concatenate(pieces)[:length]
    # The end is faded out shortly, to avoid a click; some clips end in silence.
    tail = int(SAMPLE_RATE * (rng.uniform(0.1, 0.4) if rng.random() < 0.5 else 0.0))
    fade = min(320, length)
    if tail + fade < length // 2:
        sound[length - tail :] = 0
        sound[length - tail - fade : length - tail] *= np.linspace(1, 0, fade)
    return sound


def _write_sentence(rng: np.random.Generator, words: tuple[str, ...], count: int) -> str:
    chosen = [str(word) for word in rng.choice(words, size=count)]
    for place in range(1, count - 1):
        if rng.random() < 0.15:
            chosen[place] += ","
    return " ".join(chosen).capitalize() + str(rng.choice([".", ".", "!", "?"]))


def _speak(text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
    """Synthesise one sentence at 16 kHz, without its leading and trailing silence."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise MissingToolError(
            "the program espeak-ng is not installed; it speaks the training sentences. Install it "
            "with your system's packages, for example: apt-get install espeak-ng"
        )
    command = [program, "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "--stdout"]
    run = subprocess.run([*command, text], capture_output=True, check=False)
    start = run.stdout.find(b"data")
    if run.returncode != 0 or start < 0:
        raise AudioError(
            f"espeak-ng gave no sound for voice {voice!r}: {run.stderr.decode().strip()!r}; "
            "check that the package is complete by running espeak-ng yourself"
        )
    rate = int.from_bytes(run.stdout[24:28], "little")
    body = run.stdout[start + 8 :]
    sound = torch.frombuffer(bytearray(body[: len(body) // 2 * 2]), dtype=torch.int16) / 32768
    sound = resample(sound, rate, SAMPLE_RATE).numpy()
    audible = np.flatnonzero(np.abs(sound) > 1e-3)
    if audible.size == 0:
        raise AudioError(f"espeak-ng was silent for voice {voice!r}; update the package")
    return sound[audible[0] : audible[-1] + 1].astype(np.float64)


def _degrade(rng: np.random.Generator, clean: np.ndarray) -> np.ndarray:
    """Add room, noise and music as in ordinary recordings; in most cases none of them."""
    sound = clean / max(float(np.abs(clean).max()), 1e-6)
    speech_level = float(np.sqrt(np.mean(sound**2)))
    if rng.random() < 0.25:
        sound = _add_room(rng, sound)
    if rng.random() < 0.35:
        noise = _colour_noise(rng, len(sound))
        sound = sound + noise * speech_level * 10 ** (-rng.uniform(28, 45) / 20)
    if rng.random() < 0.12:
        music = _play_music(rng, len(sound))
        sound = sound + music * speech_level * 10 ** (-rng.uniform(26, 36) / 20)
    peak = 10 ** (-rng.uniform(1, 14) / 20)
    return sound * peak / max(float(np.abs(sound).max()), 1e-6)


def _add_room(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """Add a short exponential echo tail; the direct sound comes first, so nothing is delayed."""
    decay = rng.uniform(0.08, 0.25)
    times = np.arange(int(SAMPLE_RATE * decay)) / SAMPLE_RATE
    tail = rng.standard_normal(len(times)) * 10 ** (-3 * times / decay)
    tail *= rng.uniform(0.1, 0.35) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return signal.fftconvolve(sound, tail)[: len(sound)]


def _colour_noise(rng: np.random.Generator, length: int) -> np.ndarray:
    """Return noise of unit power with a spectrum between white and brown."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    hertz = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 40.0)
    noise = np.fft.irfft(spectrum * hertz ** -rng.uniform(0, 1), length)
    return noise / max(float(noise.std()), 1e-9)


def _play_music(rng: np.random.Generator, length: int) -> np.ndarray:
    """Return slow soft chords of unit power."""
    times = np.arange(length) / SAMPLE_RATE
    music = np.zeros(length)
    root = rng.uniform(110, 220)
    for chord in range(1 + int(times[-1] / 1.5)):
        envelope = np.exp(-(((times - 1.5 * chord - 0.75) / 0.6) ** 2))
        step = int(rng.choice([0, 3, 5, 7, 8]))
        for interval in (0, 4, 7, 12):
            hertz = root * 2 ** ((step + interval) / 12)
            music += envelope * np.sin(2 * np.pi * hertz * times + rng.uniform(0, 6.28))
    return music / max(float(music.std()), 1e-9)
