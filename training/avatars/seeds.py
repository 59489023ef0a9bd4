"""Random streams that two splits can never share.

Every draw of the synthetic set has a split, a seed and a purpose; the three are hashed together
into the state of one generator. All modules of the set get their randomness here.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import numpy as np

from turbotalk_core.errors import RequestError

Split = Literal["train", "heldout"]


def open_stream(split: str, seed: int, purpose: str) -> np.random.Generator:
    """Open the random stream of one draw.

    Args:
        split: `train` or `heldout`.
        seed: any integer of at least 0.
        purpose: name of what is drawn, for example `avatar`; streams of different purposes are
            independent.

    Returns:
        A generator seeded with SHA-256 of `split/seed/purpose`.

    Raises:
        RequestError: if the split is unknown or the seed negative.
    """
    if split not in get_args(Split):
        raise RequestError(f"got the split {split!r}; it must be one of {list(get_args(Split))}")
    if seed < 0:
        raise RequestError(f"got the seed {seed}; it must be 0 or more")
    digest = hashlib.sha256(f"{split}/{seed}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
