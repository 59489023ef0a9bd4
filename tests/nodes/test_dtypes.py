"""Files of every dtype, through the host's loader and ours: what they hold is what counts.

A CPU computes in float32 whatever is stored, so a file answers as one that holds the same values in
float32, but for the order of sums.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.family import AUDIO_WIDTH, NUM_AUDIO_LAYERS

FLOAT8 = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
VISIBLE = 0.01  # what is lost by rounding to float8 moves the velocity more than this


def assert_same(got, wanted):
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def widen(tensors):
    return {name: tensor.float() for name, tensor in tensors.items()}


def cast(tensors, dtype):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def scale(tensors, dtype, *, per_row=False):
    """Put the matrices of the blocks into float8, as published, and all vectors into float32.

    Returns:
        What is stored; the scales by layer; the same multiplied out, in float32.
    """
    stored, scales, plain = {}, {}, {}
    for name, tensor in tensors.items():
        stored[name] = tensor.float() if tensor.ndim == 1 else tensor
        plain[name] = tensor.float()
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            wide = tensor.float()
            largest = wide.abs().amax(1, keepdim=True) if per_row else wide.abs().max()
            factor = scales[name.removesuffix(".weight")] = largest / torch.finfo(dtype).max
            stored[name] = (wide / factor).to(dtype)
            plain[name] = stored[name].float() * factor
    assert len({tensor.dtype for tensor in stored.values()}) == 3
    return stored, scales, plain


def spell(scales, spelling, dtype):
    """Name the scales as files do: more tensors and more metadata."""
    layers = {layer: {"format": f"float8_{dtype}"} for layer in scales}
    if spelling == "scale_weight":
        tensors = {f"{layer}.scale_weight": factor for layer, factor in scales.items()}
        return tensors | {"scaled_fp8": torch.zeros(2, dtype=FLOAT8[dtype])}, {}
    tensors = {f"{layer}.weight_scale": factor for layer, factor in scales.items()}
    if spelling == "weight_scale, metadata":
        return tensors, {"_quantization_metadata": json.dumps({"layers": layers})}
    for layer, told in layers.items():
        letters = list(json.dumps(told).encode())
        tensors[f"{layer}.comfy_quant"] = torch.tensor(letters, dtype=torch.uint8)
    return tensors, {}


@pytest.fixture
def write(host, family):
    """Write tensors beside a file of the family, with its metadata, and give the name."""

    def save(beside, tensors, metadata=None):
        with safe_open(beside, framework="pt") as file:
            metadata = file.metadata() | (metadata or {})
        save_file(tensors, beside.with_name("other_dtype.safetensors"), metadata)
        return "other_dtype.safetensors"

    return save


class TestTransformer:
    """The host's loader and our patch."""

    @pytest.fixture
    def load(self, family, models, run_node, write):
        def load(tensors, *, metadata=None, weight_dtype="default"):
            name = write(family.dit, tensors, metadata)
            return run_node(
                "TurboTalkApplyAudioAdapter",
                model=run_node("UNETLoader", unet_name=name, weight_dtype=weight_dtype),
                model_patch=models.patch,
                strength=1.0,
            )

        return load

    @pytest.fixture
    def apply_scaled(self, family, run_node, write):
        """Apply the adapter from a file in scaled float8 and float32."""
        stored, scales, _ = scale(load_file(family.adapter), FLOAT8["e4m3fn"])
        more, _ = spell(scales, "scale_weight", "e4m3fn")
        patch = run_node("TurboTalkLoadAudioAdapter", name=write(family.adapter, stored | more))

        def apply(model):
            return run_node(
                "TurboTalkApplyAudioAdapter", model=model, model_patch=patch, strength=1.0
            )

        return apply

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FLOAT8.values()])
    def test_plain(self, family, load, velocity, dtype):
        tensors = load_file(family.dit)
        stored = cast(tensors, dtype)
        got = velocity(load(stored))
        assert_same(got, velocity(load(widen(stored))))
        if dtype != torch.float16:  # what the family is in
            assert (got - velocity(load(tensors))).abs().max() > VISIBLE / 10

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    def test_computed_in_half_the_bits(self, host, models, apply_scaled, velocity, dtype):
        """As on a GPU, where video tokens come to our patch in that dtype; of any adapter."""
        wanted = velocity(apply_scaled(models.bare))
        node = host.model_advanced_nodes.ModelComputeDtype()
        got = velocity(apply_scaled(node.patch(models.bare, dtype)[0]))
        error = (got - wanted).norm() / wanted.norm()
        assert 0 < error < (0.002 if dtype == "fp16" else 0.02)

    @pytest.mark.parametrize("dtype", FLOAT8)
    def test_rounded_by_the_loader(self, family, load, velocity, dtype):
        tensors = load_file(family.dit)
        model = load(tensors, weight_dtype=f"fp8_{dtype}")
        rounded = cast(tensors, FLOAT8[dtype])
        for name in ("patch_embedding.weight", "patch_embedding.bias"):
            rounded[name] = tensors[name]  # the host keeps these in float32
        held = model.model.diffusion_model.state_dict()
        assert {name for name, weight in held.items() if weight.dtype != FLOAT8[dtype]} == {
            "patch_embedding.weight",
            "patch_embedding.bias",
        }
        got = velocity(model)
        assert_same(got, velocity(load(widen(rounded))))
        assert (got - velocity(load(tensors))).abs().max() > VISIBLE

    @pytest.mark.parametrize(
        ("spelling", "dtype"),
        [
            ("scale_weight", "e4m3fn"),  # the host takes e5m2 in this spelling for e4m3fn
            ("weight_scale, metadata", "e4m3fn"),
            ("weight_scale, metadata", "e5m2"),
            ("weight_scale, comfy_quant", "e4m3fn"),
            ("weight_scale, comfy_quant", "e5m2"),
        ],
    )
    def test_scaled(self, family, load, velocity, spelling, dtype):
        tensors = load_file(family.dit)
        stored, scales, plain = scale(tensors, FLOAT8[dtype])
        more, metadata = spell(scales, spelling, dtype)
        model = load(stored | more, metadata=metadata)
        held = model.model.diffusion_model.blocks[1].ffn[0].weight
        assert held.storage_dtype == FLOAT8[dtype]
        got = velocity(model)
        assert_same(got, velocity(load(plain)))
        assert (got - velocity(load(tensors))).abs().max() > VISIBLE


class TestAdapter:
    """Our loader; what comes out holds what the file holds, in the file's dtypes."""

    @pytest.fixture
    def load(self, family, run_node, write):
        def load(tensors, metadata=None):
            name = write(family.adapter, tensors, metadata)
            return run_node("TurboTalkLoadAudioAdapter", name=name)

        return load

    @pytest.fixture
    def answer(self, models, part, run_node, velocity):
        """What the projection and the attention of an adapter answer, in one row."""

        def answer(patch):
            first, later = (
                torch.randn(shape, generator=torch.Generator().manual_seed(1))
                for shape in (
                    (5, NUM_AUDIO_LAYERS, AUDIO_WIDTH),
                    (1, 8, NUM_AUDIO_LAYERS, AUDIO_WIDTH),
                )
            )
            windows = part("turbotalk_core.types").AudioWindows(first_KLD=first, later_FKLD=later)
            with torch.inference_mode():
                tokens = part("nodes.host.audio_adapter").HostAdapter(patch)(windows).tokens_FND
            model = run_node(
                "TurboTalkApplyAudioAdapter", model=models.bare, model_patch=patch, strength=1.0
            )
            return torch.cat((tokens.flatten(), velocity(model, tokens).flatten()))

        return answer

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FLOAT8.values()])
    def test_plain(self, family, load, answer, dtype):
        tensors = load_file(family.adapter)
        stored = cast(tensors, dtype)
        patch = load(stored)
        assert {weight.dtype for weight in patch.model.state_dict().values()} == {dtype}
        got = answer(patch)
        assert_same(got, answer(load(widen(stored))))
        if dtype != torch.float16:  # what the family is in
            assert (got - answer(load(tensors))).abs().max() > VISIBLE / 10

    def test_mixed(self, family, load, answer):
        """As in kijai's files: matrices of the blocks in float16, the rest in float32."""
        stored = {
            name: tensor.half() if "blocks." in name and tensor.ndim == 2 else tensor.float() / 3
            for name, tensor in load_file(family.adapter).items()
        }
        patch = load(stored)
        held = patch.model.state_dict()
        assert {name: weight.dtype for name, weight in held.items()} == {
            name: tensor.dtype for name, tensor in stored.items()
        }
        assert_same(answer(patch), answer(load(widen(stored))))

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize("per_row", [False, True])
    @pytest.mark.parametrize("dtype", FLOAT8)
    @pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale, comfy_quant"])
    def test_scaled(self, family, load, answer, spelling, dtype, per_row, prefix):
        tensors = load_file(family.adapter)
        stored, scales, plain = scale(tensors, FLOAT8[dtype], per_row=per_row)
        more, metadata = spell(scales, spelling, dtype)
        file = {prefix + name: tensor for name, tensor in (stored | more).items()}
        patch = load(file, metadata)
        kept = sum(tensor.nbytes for tensor in stored.values())
        assert kept <= patch.model_size() < 1.2 * kept  # still float8
        got = answer(patch)
        assert_same(got, answer(load(plain)))
        assert (got - answer(load(tensors))).abs().max() > VISIBLE

    def test_what_is_quantised_otherwise_is_refused(self, errors, family, load):
        tensors = load_file(family.adapter)
        name = "blocks.0.audio_cross_attn.proj"
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.int8)
        tensors[f"{name}.weight_scale"] = torch.ones(())
        with pytest.raises(errors.CheckpointError, match=r"quantised as packed.*in fp8"):
            load(tensors)

    def test_a_scale_without_its_weight_is_refused(self, errors, family, load):
        tensors = load_file(family.adapter) | {"blocks.9.norm_x.scale_weight": torch.ones(())}
        with pytest.raises(errors.CheckpointError, match=r"without a weight"):
            load(tensors)
