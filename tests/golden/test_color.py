"""Colours brought to those of a picture."""

import re

from tests.golden.figures import Golden
from turbotalk_core.chunking.color import match_color, rgb_to_lab


def test_equals_the_reference(golden: Golden) -> None:
    reference_BCHW = golden["ref"][:, :, 0]
    lab = rgb_to_lab((golden["ref"] + 1) / 2)
    golden.expect("ref_lab", lab[0, :, 0].permute(1, 2, 0))
    for name in golden.under("out_"):
        # out_s05 is the source at strength 0.5, out_flat the tensor "flat" at full strength
        strength = re.fullmatch(r"s(\d)(\d*)", name)
        frames = golden["src" if strength else name]
        value = float(f"{strength[1]}.{strength[2]}") if strength else 1.0
        golden.expect(f"out_{name}", match_color(frames, reference_BCHW, value))
