"""Looks of an avatar: all traits, drawn from a seed.

The traits are separate from the rendering, so that an avatar is a plain value that can be compared.

All lengths are in head units, half a head's height, with the origin in the middle of the face and
`v` pointing down. No colour of a palette may have a green value clearly below both red and blue:
that is reserved for the open mouth (see mouth.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.avatars.canvas import Colour
from training.avatars.seeds import open_stream

SKINS: tuple[Colour, ...] = (
    (0.99, 0.86, 0.76), (0.97, 0.80, 0.68), (0.92, 0.72, 0.57), (0.84, 0.62, 0.46),
    (0.73, 0.51, 0.36), (0.60, 0.40, 0.27), (0.48, 0.31, 0.21), (0.39, 0.25, 0.18),
)  # fmt: skip
HAIRS: tuple[Colour, ...] = (
    (0.13, 0.12, 0.12), (0.19, 0.14, 0.12), (0.30, 0.20, 0.14), (0.43, 0.27, 0.17),
    (0.55, 0.27, 0.15), (0.80, 0.44, 0.20), (0.88, 0.68, 0.38), (0.95, 0.87, 0.70),
    (0.64, 0.64, 0.63), (0.85, 0.86, 0.85), (0.16, 0.46, 0.50),
)  # fmt: skip
HAIR_SHARES = (0.16, 0.14, 0.15, 0.12, 0.09, 0.09, 0.09, 0.05, 0.05, 0.03, 0.03)
EYES: tuple[Colour, ...] = (
    (0.30, 0.19, 0.12), (0.42, 0.27, 0.14), (0.45, 0.42, 0.20), (0.27, 0.47, 0.34),
    (0.22, 0.46, 0.66), (0.40, 0.50, 0.56),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (0.13, 0.46, 0.48), (0.15, 0.23, 0.38), (0.93, 0.70, 0.26), (0.90, 0.40, 0.31),
    (0.22, 0.44, 0.33), (0.96, 0.92, 0.84), (0.24, 0.26, 0.28), (0.32, 0.48, 0.66),
    (0.73, 0.36, 0.22), (0.58, 0.75, 0.82), (0.50, 0.52, 0.28), (0.76, 0.28, 0.24),
    (0.62, 0.80, 0.68), (0.94, 0.62, 0.48),
)  # fmt: skip
BACKGROUNDS: tuple[Colour, ...] = (
    (0.72, 0.84, 0.76), (0.68, 0.84, 0.92), (0.96, 0.88, 0.74), (0.99, 0.82, 0.68),
    (0.97, 0.94, 0.87), (0.17, 0.40, 0.44), (0.16, 0.25, 0.40), (0.86, 0.52, 0.38),
    (0.95, 0.79, 0.44), (0.56, 0.69, 0.82), (0.45, 0.62, 0.54), (0.86, 0.86, 0.83),
    (0.46, 0.74, 0.74),
)  # fmt: skip
HAIR_STYLES = (
    *("crop", "buzz", "quiff", "swept", "bob", "fringe_bob", "long", "centre_long"),
    *("bun", "afro", "curls", "ponytail", "bald", "scarf"),
)
COLLARS = ("crew", "vee", "shirt", "turtle", "hood", "jacket")


@dataclass(frozen=True, slots=True, kw_only=True)
class Avatar:
    """Looks of one person and the framing of the picture.

    Attributes:
        centre: middle of the face at rest, in picture units of 1/128.
        scale: picture units per head unit; the head is twice that high.
        is_half_body: whether chest and a hand are visible.
        liveliness: amplitude of head motion, around 1.
        light: side of the light, -1 left or 1 right.
        backdrop: upper and lower colour of the background, and the colour of its shape.
        backdrop_shape: centre and radius of the shape in picture units.
        face_width: half width of the face.
        jaw: narrowing of the face towards the chin.
        roundness: exponent of the outline; 2 is an ellipse.
        skin: colour.
        lips: colour.
        blush: strength of the cheeks' red.
        has_freckles: whether there are dots on the cheeks.
        hair_style: one of HAIR_STYLES.
        hair: colour.
        hair_side: side of the parting or tail, -1 or 1.
        hair_volume: around 1.
        brows: colour.
        brow_shape: thickness, arch, tilt.
        eyes: colour.
        eye_shape: half width, half height, tilt, distance from the middle.
        has_lashes: whether the outer lashes are longer.
        nose_shape: half width, height above the mouth.
        mouth_shape: half width, fullness of the lips, smile.
        ears: size.
        beard: 0 none, 1 stubble, 2 beard, 3 moustache.
        glasses: 0 none, 1 round, 2 square.
        frames: colour of the glasses.
        clothes: colours of the main piece and of its trimming.
        collar: one of COLLARS.
        shoulders: half width.
        hand_side: side of the hand in a half body, -1 or 1.
        has_earrings: whether there are small drops at the ears.
    """

    centre: tuple[float, float]
    scale: float
    is_half_body: bool
    liveliness: float
    light: float
    backdrop: tuple[Colour, Colour, Colour]
    backdrop_shape: tuple[float, float, float]
    face_width: float
    jaw: float
    roundness: float
    skin: Colour
    lips: Colour
    blush: float
    has_freckles: bool
    hair_style: str
    hair: Colour
    hair_side: float
    hair_volume: float
    brows: Colour
    brow_shape: tuple[float, float, float]
    eyes: Colour
    eye_shape: tuple[float, float, float, float]
    has_lashes: bool
    nose_shape: tuple[float, float]
    mouth_shape: tuple[float, float, float]
    ears: float
    beard: int
    glasses: int
    frames: Colour
    clothes: tuple[Colour, Colour]
    collar: str
    shoulders: float
    hand_side: float
    has_earrings: bool


def blend(start: Colour, stop: Colour, share: float) -> Colour:
    """Interpolate linearly from one colour to another; `share` is in [0, 1]."""
    red, green, blue = (a + (b - a) * share for a, b in zip(start, stop, strict=True))
    return red, green, blue


def dim(colour: Colour, amount: float) -> Colour:
    """Multiply a colour by an amount, clipped to [0, 1]."""
    red, green, blue = (min(1.0, amount * value) for value in colour)
    return red, green, blue


def draw_avatar(split: str, seed: int) -> Avatar:
    """Draw an avatar.

    Args:
        split: `train` or `heldout`; the two have independent draws.
        seed: 0 or more.

    Returns:
        The avatar; the same arguments return the same one.

    Raises:
        RequestError: if the split is unknown or the seed negative.
    """
    rng = open_stream(split, seed, "avatar")
    uniform = rng.uniform

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    def side() -> float:
        return -1.0 if chance(0.5) else 1.0

    is_half_body = chance(0.10)
    scale = uniform(29.0, 31.0) if is_half_body else uniform(45.0, 50.0)
    place = int(uniform(0, len(SKINS) - 1e-6))
    skin = _vary(rng, SKINS[place], 0.015)
    # Fair hair on dark skin is rare, so its share is reduced; dyed teal keeps its share.
    shares = np.array(HAIR_SHARES)
    if place >= 4:
        shares[3:8] *= 0.1
    hair = _vary(rng, HAIRS[int(rng.choice(len(HAIRS), p=shares / shares.sum()))], 0.015)
    style = str(rng.choice(HAIR_STYLES))
    reads_feminine = style in (
        "bob",
        "fringe_bob",
        "long",
        "centre_long",
        "bun",
        "ponytail",
        "scarf",
    )
    main = _vary(rng, CLOTHES[int(rng.integers(len(CLOTHES)))], 0.015)
    if style == "scarf":
        hair = _vary(rng, CLOTHES[int(rng.integers(len(CLOTHES)))], 0.015)
    backdrop = _pick_backdrop(rng, (hair, skin, main))
    is_bearded = not reads_feminine and chance(0.45)
    fair = sum(hair) > 1.5
    brows = blend(hair, (0.36, 0.25, 0.17), 0.65) if fair else dim(hair, 0.8)
    if style == "scarf":
        brows = (0.22, 0.16, 0.13)
    redness = uniform(0.35, 0.75) if reads_feminine else uniform(0.15, 0.4)
    deep = blend(dim(skin, 0.72), (0.78, 0.26, 0.22), 0.75)
    return Avatar(
        centre=(
            64 + uniform(-5, 5),
            uniform(40.0, 43.0) if is_half_body else uniform(61.0, 65.0),
        ),
        scale=scale,
        is_half_body=is_half_body,
        liveliness=uniform(0.75, 1.25),
        light=side(),
        backdrop=backdrop,
        backdrop_shape=(64 + uniform(-22, 22), 50 + uniform(-18, 18), uniform(34, 56)),
        face_width=uniform(0.74, 0.83),
        jaw=uniform(0.06, 0.24),
        roundness=uniform(2.05, 2.5),
        skin=skin,
        lips=blend(skin, deep, redness),
        blush=uniform(0.1, 0.45),
        has_freckles=place < 4 and chance(0.2),
        hair_style=style,
        hair=hair,
        hair_side=side(),
        hair_volume=uniform(0.85, 1.2),
        brows=brows,
        brow_shape=(uniform(0.026, 0.05), uniform(0.02, 0.09), uniform(-0.055, 0.02)),
        eyes=_vary(
            rng, EYES[0 if place >= 4 and chance(0.7) else int(rng.integers(len(EYES)))], 0.02
        ),
        eye_shape=(
            uniform(0.15, 0.18),
            uniform(0.105, 0.14),
            uniform(-0.01, 0.035),
            uniform(0.32, 0.37),
        ),
        has_lashes=reads_feminine or chance(0.1),
        nose_shape=(uniform(0.07, 0.12), uniform(0.19, 0.25)),
        mouth_shape=(uniform(0.30, 0.335), uniform(0.8, 1.25), uniform(0.01, 0.06)),
        ears=uniform(0.9, 1.15),
        beard=int(rng.choice([1, 2, 2, 3])) if is_bearded else 0,
        glasses=int(rng.choice([0, 1, 2], p=[0.74, 0.14, 0.12])),
        frames=((0.15, 0.15, 0.16), (0.45, 0.28, 0.15), (0.80, 0.62, 0.28))[int(rng.integers(3))],
        clothes=(main, _pick_trimming(rng, main)),
        collar=str(rng.choice(COLLARS)),
        shoulders=uniform(1.45, 1.7),
        hand_side=side(),
        has_earrings=reads_feminine and chance(0.4),
    )


def _vary(rng: np.random.Generator, colour: Colour, amount: float) -> Colour:
    """Change the brightness a little, equally in all channels, to keep the rule on green."""
    return dim(colour, 1 + float(rng.uniform(-4, 4)) * amount)


def _distance(left: Colour, right: Colour) -> float:
    return float(np.linalg.norm(np.subtract(left, right)))


def _pick_backdrop(
    rng: np.random.Generator, worn: tuple[Colour, ...]
) -> tuple[Colour, Colour, Colour]:
    """Choose background colours that differ from those in front of them."""
    tries = [BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))] for _ in range(4)]
    top = max(tries, key=lambda colour: min(_distance(colour, other) for other in worn))
    bottom = dim(top, float(rng.uniform(0.82, 0.95)))
    shape = blend(top, (1.0, 0.98, 0.93), float(rng.uniform(0.18, 0.4)))
    return top, bottom, shape


def _pick_trimming(rng: np.random.Generator, main: Colour) -> Colour:
    """Choose a second colour that is visible on the first."""
    tries = [CLOTHES[int(rng.integers(len(CLOTHES)))] for _ in range(3)]
    return max(tries, key=lambda colour: _distance(colour, main))
