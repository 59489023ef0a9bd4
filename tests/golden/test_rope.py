"""Rotary and time embeddings, and places on the line of speakers."""

import torch

from tests.golden.figures import Golden
from turbotalk_core.models.rotary import line_frequencies, line_table, rotary_table, rotate
from turbotalk_core.models.speaker_embedding import fill_stretch
from turbotalk_core.models.wan import time_sinusoid


def test_equals_the_reference(golden: Golden) -> None:
    frames, rows, columns = golden["grid"][0].int().tolist()
    head_dim = golden["q"].shape[-1]
    table = rotary_table((frames, rows, columns), head_dim, torch.device("cpu"))
    golden.expect("out", rotate(golden["q"], table))
    frequencies = line_frequencies(golden["q1d"].shape[-1], torch.device("cpu"))
    line = line_table(golden["pos1d"], frequencies)
    golden.expect("out1d", rotate(golden["q1d"].transpose(1, 2), line).transpose(1, 2))
    start = golden["ns_out"].min().item()
    golden.expect("ns_out", fill_stretch(golden["ns_in"], start))
    width = golden["time_sinusoid"].shape[1]
    golden.expect("time_sinusoid", time_sinusoid(golden["time_t"], width))
