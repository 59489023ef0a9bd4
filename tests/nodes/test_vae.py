"""The host's VAE: whose code computes, with which weights, and that it can be stopped."""

import gc
import weakref

import pytest
import torch


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asked(host, monkeypatch):
    """What the host's own code was asked for."""
    asked = []

    def watch(name):
        inner = getattr(host.sd.VAE, name)

        def spy(self, tensor):
            asked.append(name)
            return inner(self, tensor)

        monkeypatch.setattr(host.sd.VAE, name, spy)

    watch("encode")
    watch("decode")
    return asked


@pytest.fixture
def run(part, models):
    """Call every method of the codec over the family's VAE."""
    frames, latents = noise(1, 3, 9, 32, 48).clamp(-1, 1), noise(1, 16, 3, 4, 6)

    def run():
        with torch.inference_mode():
            vae = part("nodes.host.vae").HostVAE(models.vae)
            reference = vae.encode_reference(frames[:, :, 0], 9)
            return vae.encode(frames), reference, vae.decode(latents)

    return run


def put_in_layer(vae):
    layer = vae.first_stage_model.decoder.conv1
    layer.forward = layer.forward


def put_other_layer(vae):
    layer = vae.first_stage_model.decoder.conv1
    layer.__class__ = type("Other", (type(layer),), {"__module__": "other_pack"})


def put_weight_function(vae):
    layer = vae.first_stage_model.decoder.conv1
    layer.weight_function = [lambda weight: weight]


def put_other_vae(vae):
    vae.__class__ = type("Other", (type(vae),), {})


def put_other_network(vae):
    network = vae.first_stage_model
    network.__class__ = type("Other", (type(network),), {"__module__": "comfy.other"})


CHANGES = {
    "a method of the VAE": lambda vae: setattr(vae, "encode", vae.encode),
    "a layer's method": put_in_layer,
    "a layer": put_other_layer,
    "what follows a layer": lambda vae: vae.first_stage_model.encoder.register_forward_hook(
        lambda *_: None
    ),
    "what a layer makes of its weight": put_weight_function,
    "the VAE": put_other_vae,
    "the network": put_other_network,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_host_computes_what_is_not_as_it_left_it(models, asked, run, change):
    """So nothing that another pack put in is passed over; and both give the same up to rounding."""
    got = run()
    assert asked == []
    CHANGES[change](models.vae)
    wanted = run()
    assert asked == ["encode", "encode", "decode"]
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_host_computes_in_other_dtypes(models, asked, run, dtype):
    models.vae.vae_dtype = dtype
    with torch.inference_mode():
        models.vae.first_stage_model.to(dtype)
    run()
    assert asked == ["encode", "encode", "decode"]


def test_the_host_computes_on_other_devices(host, models, part, monkeypatch):
    models.vae.device = torch.device("meta")
    monkeypatch.setattr(host.sd.VAE, "decode", lambda *_: torch.full((1, 5, 8, 8, 3), 0.75))
    monkeypatch.setattr(host.model_management, "load_models_gpu", None)  # left to the host, too
    frames = part("nodes.host.vae").HostVAE(models.vae).decode(noise(1, 16, 2, 1, 1))
    assert torch.equal(frames, torch.full((1, 3, 5, 8, 8), 0.5))


def test_the_host_computes_what_is_as_wide_as_the_public_file(models, asked, run):
    models.vae.first_stage_model.dim = 96
    run()
    assert asked == ["encode", "encode", "decode"]


def test_the_host_computes_other_structures(host, models, asked, part):
    """Such as one with twelve channels out, of which others make a picture twice the size."""
    weights = models.vae.get_sd()
    for name in ("weight", "bias"):
        weights[f"decoder.head.2.{name}"] = weights[f"decoder.head.2.{name}"].repeat(
            4, *[1] * (weights[f"decoder.head.2.{name}"].ndim - 1)
        )
    with torch.inference_mode():
        frames = (
            part("nodes.host.vae").HostVAE(host.sd.VAE(sd=weights)).decode(noise(1, 16, 1, 4, 6))
        )
    assert asked == ["decode"]
    assert frames.shape[1] == 12


def test_patches_hold_where_the_core_computes(models, asked, run):
    """Its weights are the host's at each call: as patched, and as they were when that is undone."""
    vae, name = models.vae, "decoder.head.2.weight"
    plain = run()[2]
    vae.patcher, unpatched = vae.patcher.clone(), vae.patcher
    vae.patcher.add_patches({name: ("diff", (torch.full_like(vae.get_sd()[name], 0.1),))})
    patched = run()[2]
    assert not torch.allclose(plain, patched, atol=0.01)
    assert asked == []
    put_in_layer(vae)
    assert (run()[2] - patched).abs().max() < 1e-4
    del vae.first_stage_model.decoder.conv1.forward
    vae.patcher = unpatched
    assert torch.equal(run()[2], plain)


def test_weights_are_not_held_twice(models, part):
    with torch.inference_mode():
        vae = part("nodes.host.vae").HostVAE(models.vae)
        vae.decode(noise(1, 16, 1, 4, 6))
        theirs = models.vae.first_stage_model.state_dict()
        ours = vae._core.state_dict()
    assert {name: weight.data_ptr() for name, weight in ours.items()} == {
        name: weight.data_ptr() for name, weight in theirs.items()
    }


def test_nothing_stays_of_a_vae_that_nobody_needs(host, models, run):
    run()
    vae, network = weakref.ref(models.vae), weakref.ref(models.vae.first_stage_model)
    models.vae = None
    gc.collect()
    host.model_management.cleanup_models()
    assert (vae(), network()) == (None, None)


@pytest.mark.parametrize("method", ["encode", "encode_reference", "decode"])
def test_it_can_be_stopped_in_the_middle(models, part, monkeypatch, method):
    calls = []

    def stop():
        calls.append(method)
        if len(calls) == 50:
            raise InterruptedError

    monkeypatch.setattr(part("nodes.host.vae"), "check_stop", stop)
    given = {
        "encode": [noise(1, 3, 9, 32, 48)],
        "encode_reference": [noise(1, 3, 32, 48), 9],
        "decode": [noise(1, 16, 3, 4, 6)],
    }
    vae = part("nodes.host.vae").HostVAE(models.vae)
    with torch.inference_mode(), pytest.raises(InterruptedError):
        getattr(vae, method)(*given[method])
    assert len(calls) == 50
