"""Rotary and time embeddings."""

import torch

from tests.golden.figures import Golden
from turbotalk_core.model.wan import rotary_table, rotate, time_sinusoid


def test_equals_the_reference(golden: Golden) -> None:
    frames, rows, columns = golden["grid"][0].int().tolist()
    head_dim = golden["q"].shape[-1]
    table = rotary_table((frames, rows, columns), head_dim, torch.device("cpu"))
    golden.expect("out", rotate(golden["q"], table))
    width = golden["time_sinusoid"].shape[1]
    golden.expect("time_sinusoid", time_sinusoid(golden["time_t"], width))
