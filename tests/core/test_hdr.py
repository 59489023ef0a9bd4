"""Signals of high dynamic range become pictures of standard range as the standards define."""

import pytest
import torch

from turbotalk_core.hdr import HLG, PQ, TRANSFERS, WHITE, tone_map

PQ_OF_WHITE, HLG_OF_WHITE = 0.5807, 0.75  # signals of diffuse white, ITU-R BT.2408 table 1
PQ_OF_PEAK = 0.7518  # of 1000 cd/m², ITU-R BT.2100


def _grey(signal: float, transfer: int) -> torch.Tensor:
    return tone_map(torch.full((1, 1, 3), signal), transfer)[0, 0]


@pytest.mark.parametrize(("transfer", "peak"), [(PQ, PQ_OF_PEAK), (HLG, 1.0)])
def test_black_stays_black_and_the_peak_becomes_white(transfer: int, peak: float) -> None:
    torch.testing.assert_close(_grey(0.0, transfer), torch.zeros(3), rtol=0, atol=0.01)
    torch.testing.assert_close(_grey(peak, transfer), torch.ones(3), rtol=0, atol=2e-3)
    torch.testing.assert_close(_grey(1.0, transfer), torch.ones(3), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("transfer", "signal"), [(PQ, PQ_OF_WHITE), (HLG, HLG_OF_WHITE)])
def test_diffuse_white_is_bright_in_both(transfer: int, signal: float) -> None:
    grey = _grey(signal, transfer)
    assert (grey - grey[0]).abs().max() < 2e-3  # grey stays grey
    # The curve of BT.2390 leaves room for what is brighter.
    assert grey[0].item() == pytest.approx(0.903, abs=2e-3)


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_dark_light_is_kept(transfer: int) -> None:
    # A grey card has 26 cd/m² and the signal 0.38 in both, ITU-R BT.2408 table 1.
    assert _grey(0.38, transfer)[0].item() == pytest.approx((26 / WHITE) ** (1 / 2.4), abs=5e-3)


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_more_signal_never_gives_less_light(transfer: int) -> None:
    ramp = torch.linspace(-0.1, 1.1, 200).view(1, -1, 1).expand(1, 200, 3)
    levels = tone_map(ramp, transfer)[0, :, 0]
    assert bool(levels.isfinite().all())
    assert levels.diff().min() >= -1e-6
    assert (levels.min().item(), levels.max().item()) == pytest.approx((0, 1), abs=0.01)


def test_a_colour_inside_bt709_keeps_its_hue() -> None:
    reddish = tone_map(torch.tensor([[[0.60, 0.45, 0.40]]]), HLG)[0, 0]
    assert reddish[0] > reddish[1] > reddish[2]
    # More saturated than the flat signal.
    assert reddish[0] / reddish[2] > 0.60 / 0.40
