"""What else is done to a model in the host, before or after Apply audio adapter, still counts."""

import gc
import os
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from turbotalk_core.checkpoints.lora import merge_lora

VISIBLE = 0.01  # a change that moves the velocity by more than this is no rounding
STRENGTH = 0.7  # of the LoRA
NUM_TOKENS = 4  # of audio, per latent frame, in the family


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got, wanted):
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.fixture
def apply_adapter(models, run_node):
    """The node, with the family's adapter."""

    def apply(model):
        return run_node(
            "TurboTalkApplyAudioAdapter", model=model, model_patch=models.patch, strength=1.0
        )

    return apply


@pytest.fixture
def load_tensors(host, family, run_node):
    """The host's loader, from tensors."""

    def load(tensors, weight_dtype="default"):
        with safe_open(family.dit, framework="pt") as file:
            metadata = file.metadata()
        save_file(tensors, family.dit.with_name("patched.safetensors"), metadata)
        return run_node("UNETLoader", unet_name="patched.safetensors", weight_dtype=weight_dtype)

    return load


def draw_lora(spelling):
    """Changes of a matrix, of another with alpha, and of whole tensors."""
    down, up = {"kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B")}[spelling]
    lora = {}
    for index, (name, rows, columns) in enumerate(
        (
            ("blocks.1.ffn.0", 96, 48),
            ("blocks.0.cross_attn.k", 48, 48),
            ("blocks.0.self_attn.q", 48, 48),
        )
    ):
        rank = 2 + index
        lora[f"{name}.{down}.weight"] = noise(rank, columns, seed=index)
        lora[f"{name}.{up}.weight"] = 0.3 * noise(rows, rank, seed=index + 10)
    lora["blocks.1.ffn.0.alpha"] = torch.tensor(4.0)
    lora["blocks.0.ffn.2.diff"] = 0.3 * noise(48, 96)
    lora["blocks.0.ffn.2.diff_b"] = 0.3 * noise(48)
    return {f"diffusion_model.{name}": tensor for name, tensor in lora.items()}


@pytest.fixture(params=["kohya", "peft"])
def lora(request):
    return draw_lora(request.param)


@pytest.fixture
def lora_name(host, lora):
    """Of the file with the LoRA."""
    folder = host.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora, folder / "random.safetensors")
    return "random.safetensors"


@pytest.fixture
def add_lora(run_node, lora_name):
    """The host's LoRA node."""

    def add(model):
        return run_node(
            "LoraLoaderModelOnly", model=model, lora_name=lora_name, strength_model=STRENGTH
        )

    return add


@pytest.fixture
def merged(family, lora, load_tensors):
    """The model from a file into which the core has merged the LoRA."""
    weights = {name: tensor.float() for name, tensor in load_file(family.dit).items()}
    merge_lora(weights, lora, STRENGTH)
    return load_tensors(weights)


class TestLora:
    @pytest.mark.parametrize("is_first", [True, False])
    def test_as_the_core_merges_it(
        self, models, apply_adapter, add_lora, merged, velocity, is_first
    ):
        model = apply_adapter(add_lora(models.bare)) if is_first else add_lora(models.model)
        got = velocity(model)
        assert (got - velocity(models.model)).abs().max() > VISIBLE
        assert_same(got, velocity(apply_adapter(merged)))

    @pytest.mark.parametrize("is_first", [True, False])
    def test_beside_the_weights(
        self, host, models, apply_adapter, lora_name, merged, velocity, is_first
    ):
        """With the host's node that adds to what layers answer instead."""
        node = host.lora_debug_nodes.LoraLoaderBypassModelOnly()

        def add(model):
            return node.load_lora_model_only(model, lora_name, STRENGTH)[0]

        model = apply_adapter(add(models.bare)) if is_first else add(models.model)
        assert_same(velocity(model), velocity(apply_adapter(merged)))

    def test_on_float8_it_is_rounded_to_float8(
        self, family, apply_adapter, add_lora, merged, load_tensors, velocity
    ):
        bare = load_tensors(load_file(family.dit), weight_dtype="fp8_e4m3fn")
        plain = velocity(apply_adapter(bare))
        got = velocity(apply_adapter(add_lora(bare)))
        wanted = velocity(apply_adapter(merged))
        assert (got - wanted).norm() < 0.2 * (plain - wanted).norm()


class TestMemory:
    def test_the_host_loads_and_counts_the_adapter(self, host, family, models, velocity):
        management = host.model_management
        management.unload_all_models()
        velocity(models.model)
        loaded = {id(entry.model.model): entry for entry in management.current_loaded_models}
        assert set(loaded) == {id(models.model.model), id(models.patch.model)}
        adapter = loaded[id(models.patch.model)]
        stored = load_file(family.adapter)
        assert adapter.model_memory() == sum(tensor.nbytes for tensor in stored.values())
        assert adapter.model_loaded_memory() == adapter.model_memory()
        assert {w.dtype for w in models.patch.model.state_dict().values()} == {torch.float16}

    def test_both_go_with_the_last_who_needs_them(self, host, family, run_node, velocity):
        model = run_node("UNETLoader", unet_name=family.dit.name, weight_dtype="default")
        patch = run_node("TurboTalkLoadAudioAdapter", name=family.adapter.name)
        joined = run_node(
            "TurboTalkApplyAudioAdapter", model=model, model_patch=patch, strength=1.0
        )
        velocity(joined)
        networks = [weakref.ref(model.model), weakref.ref(patch.model)]
        del model, patch
        gc.collect()
        assert all(network() is not None for network in networks)
        del joined
        gc.collect()
        host.model_management.cleanup_models()
        assert [network() for network in networks] == [None, None]

    @pytest.mark.parametrize("lora", ["kohya"], indirect=True)
    def test_pushed_out_between_calls(self, host, part, monkeypatch, models, add_lora, sample):
        """A VAE that needs all the room, before and after each chunk."""
        model = add_lora(models.model)
        wanted = sample(model=model).read()
        assert not torch.equal(wanted, sample().read())
        vae, sizes = part("nodes.host.vae").HostVAE, []

        def push_out():
            sizes.append((model.loaded_size(), models.patch.loaded_size()))
            host.model_management.unload_all_models()
            assert model.loaded_size() == models.patch.loaded_size() == 0

        class Hungry(vae):
            def encode(self, frames_BCTHW):
                push_out()
                return super().encode(frames_BCTHW)

            def encode_reference(self, picture_BCHW, num_frames):
                push_out()
                return super().encode_reference(picture_BCHW, num_frames)

            def decode(self, latents_BCFHW):
                push_out()
                return super().decode(latents_BCFHW)

        monkeypatch.setattr(part("nodes.sampler"), "HostVAE", Hungry)
        host.model_management.unload_all_models()
        assert torch.equal(sample(model=model).read(), wanted)
        out, in_use = (0, 0), (model.model_size(), models.patch.model_size())
        # twice the portrait, the first chunk, its last frames, the second chunk
        assert sizes == [out, out, in_use, out, in_use]

    @pytest.mark.parametrize("budget", [1, 40_000, 200_000])
    @pytest.mark.parametrize("lora", ["kohya"], indirect=True)
    def test_partly_loaded(
        self, host, monkeypatch, models, apply_adapter, add_lora, merged, velocity, budget
    ):
        """With the host's own loading for devices that are too small, of which this is none."""
        wanted = velocity(apply_adapter(merged))
        model = add_lora(models.model)
        management = host.model_management
        management.unload_all_models()
        load = management.LoadedModel.model_load
        monkeypatch.setattr(
            management.LoadedModel,
            "model_load",
            lambda self, _=0, force_patch_weights=False: load(self, budget, force_patch_weights),
        )
        assert_same(velocity(model), wanted)
        assert model.loaded_size() < model.model_size()
        assert model.lowvram_patch_counter() > 0  # of the LoRA, added when a weight is used


def test_weights_that_only_another_pack_can_read(host, family, apply_adapter, models, velocity):
    """As packs for GGUF do it: own layers, own class of MODEL, and no word of the file."""
    plain = host.ops.manual_cast

    class Operations(plain):
        class Linear(plain.Linear):
            """Holds the weight upside down, as a stand-in for packed bits."""

            def _load_from_state_dict(self, tensors, prefix, *others):
                tensors[f"{prefix}weight"] = tensors[f"{prefix}weight"].flip(0).half()
                super()._load_from_state_dict(tensors, prefix, *others)

            def forward_comfy_cast_weights(self, input):
                weight, bias = host.ops.cast_bias_weight(self, input)
                return torch.nn.functional.linear(input, weight.flip(0), bias)

    class Patcher(host.model_patcher.ModelPatcher):
        pass

    with safe_open(family.dit, framework="pt") as file:
        metadata = file.metadata()
    loaded = host.sd.load_diffusion_model_state_dict(
        load_file(family.dit), model_options={"custom_operations": Operations}, metadata=metadata
    )
    model = apply_adapter(Patcher(loaded.model, loaded.load_device, loaded.offload_device))
    assert type(model) is Patcher
    assert_same(velocity(model), velocity(models.model))


class TestAttentionOverride:
    """What other packs put in the place of attention, such as SageAttention."""

    @pytest.fixture
    def with_attention(self, models, apply_adapter):
        def replace(attend):
            model = apply_adapter(models.bare)
            model.model_options["transformer_options"]["optimized_attention_override"] = attend
            return model

        return replace

    def test_it_is_asked_for_the_audio_as_well(self, models, with_attention, velocity):
        asked = []

        def attend(function, q, k, v, *args, **settings):
            asked.append(tuple(k.shape))
            return function(q, k, v, *args, **settings)

        assert_same(velocity(with_attention(attend)), velocity(models.model))
        # two blocks: the video tokens of both frames, the one text token, the audio of each frame
        assert asked == 2 * [(1, 8, 48), (1, 1, 48), (2, 2, 4, 24)]

    def test_its_answer_is_used(self, family, host, models, with_attention, run_node, velocity):
        def attend(function, q, k, v, *args, **settings):
            attended = function(q, k, v, *args, **settings)
            return torch.zeros_like(attended) if k.shape[2] == NUM_TOKENS else attended

        got = velocity(with_attention(attend))
        assert (got - velocity(models.model)).abs().max() > VISIBLE
        # an adapter whose values are all zero
        tensors = load_file(family.adapter)
        for name in tensors:
            if "kv_linear" in name:
                tensors[name] = torch.zeros_like(tensors[name])
        with safe_open(family.adapter, framework="pt") as file:
            save_file(tensors, family.adapter.with_name("numb.safetensors"), file.metadata())
        numb = run_node(
            "TurboTalkApplyAudioAdapter",
            model=models.bare,
            model_patch=run_node("TurboTalkLoadAudioAdapter", name="numb.safetensors"),
            strength=1.0,
        )
        assert_same(got, velocity(numb))


@pytest.mark.skipif(
    not shutil.which("g++") and not os.environ.get("CI"),  # CI skips nothing: there it fails
    reason="the compiler's backend for CPUs calls g++",
)
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compilation(host, models, apply_adapter, velocity, backend, is_first):
    def compile_model(model):
        return host.compile_nodes.TorchCompileModel.execute(model, backend).result[0]

    model = apply_adapter(compile_model(models.bare)) if is_first else compile_model(models.model)
    for seed in range(2):  # compiled with the first voice
        tokens = noise(2, NUM_TOKENS, 24, seed=seed)
        got = velocity(model, tokens)
        assert_same(got, velocity(models.model, tokens))
        assert not torch.equal(got, velocity(models.model, tokens + 1))
