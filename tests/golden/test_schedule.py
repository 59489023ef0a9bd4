"""Noise levels of the many-step schedule."""

import re

from tests.golden.figures import Golden
from turbotalk_core.sampling.schedule import reference_sigmas


def test_equals_the_reference(golden: Golden) -> None:
    names = [name for name in golden.tensors if name.startswith("timesteps.")]
    assert names
    for name in names:
        match = re.fullmatch(r"timesteps\.steps(\d+)\.shift([\d.]+)", name)
        assert match, name
        sigmas = reference_sigmas(int(match[1]), float(match[2]))
        golden.expect(name, 1000 * sigmas)
        golden.expect(name.replace("timesteps", "dt"), sigmas[:-1] - sigmas[1:])
