"""The host's model, with our patches, on a fake CUDA device."""

from collections import Counter

import pytest
import torch

from tests.fake_cuda import CUDA, FakeCuda


@pytest.fixture
def cuda(host, monkeypatch):
    """A fake device with memory for all that the host loads, as a GPU has it for small models."""

    def get_free_memory(dev=None, torch_free_too=False):
        return (10**12, 10**12) if torch_free_too else 10**12

    monkeypatch.setattr(host.model_management, "get_free_memory", get_free_memory)
    monkeypatch.setattr(host.model_management, "get_total_memory", get_free_memory)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)  # while weights are loaded
    with FakeCuda() as device:
        yield device
        host.model_management.unload_all_models()


@pytest.mark.parametrize("num_speakers", [1, 2])
def test_a_call_waits_for_the_device_once_per_input(cuda, models, part, num_speakers):
    types = part("turbotalk_core.types")
    regions_PHW = torch.zeros(3, 8, 12)
    regions_PHW[0, :, :6] = regions_PHW[1, :, 6:] = 1
    conditioning = types.Conditioning(
        reference_BCFHW=torch.zeros(1, 20, 2, 8, 12), regions_PHW=regions_PHW
    )
    tokens = types.AudioTokens(
        tokens_FND=torch.zeros(2, 4 * num_speakers, 24), num_speakers=num_speakers
    )
    model = models.model.clone()
    for patcher in (model, part("nodes.host.audio_adapter").find_audio_adapter(model)):
        patcher.load_device = CUDA
    denoiser = part("nodes.host.denoiser").HostDenoiser(model, torch.tensor([0.5, 0.0]))
    with torch.no_grad(), denoiser:
        denoiser(torch.zeros(1, 16, 2, 8, 12), 0.5, conditioning, tokens)  # loads the weights
        cuda.syncs.clear()
        velocity = denoiser(torch.zeros(1, 16, 2, 8, 12), 0.5, conditioning, tokens)
    assert (velocity.device.type, velocity.dtype) == ("cpu", torch.float32)
    # Latents, voice and conditioning to the device and the velocity back; no wait is in a block.
    expected = Counter({"nodes/host/denoiser.py _predict": 6})
    if num_speakers > 1:
        expected += Counter(
            {
                "nodes/host/denoiser.py _predict": 1,
                "models/speaker_embedding.py draw_line": 1,
                "models/rotary.py line_frequencies": 1,
            }
        )
    assert cuda.places() == expected
