"""Kinds of arguments that several commands of the command line take."""

from __future__ import annotations

import argparse

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_size(text: str) -> tuple[int, int] | str:
    """Read width x height, or auto.

    Args:
        text: as typed.

    Returns:
        Width and height, or ``auto``.

    Raises:
        ArgumentTypeError: anything else.
    """
    if text == "auto":
        return text
    try:
        width, height = (int(side) for side in text.lower().split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; give width x height in pixels, as in 640x640, or auto"
        ) from error
    return width, height


def parse_count(text: str) -> int:
    """Read a whole number from 1 on.

    Args:
        text: as typed.

    Returns:
        The number.

    Raises:
        ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number from 1 on")
    return int(text)


def find_device() -> torch.device:
    """Choose the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
