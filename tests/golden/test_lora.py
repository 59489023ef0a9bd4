"""LoRA files, merged as the reference merges them."""

from tests.golden.figures import Golden
from turbotalk_core.checkpoints.lora import merge_lora
from turbotalk_core.reference_behaviour import select_lora_tensors


def test_equals_the_reference(golden: Golden) -> None:
    weights, before = golden.under("before."), golden.under("before.")
    merge_lora(weights, select_lora_tensors(golden.under("lora.")), golden.settings["scale"])
    for name, weight in weights.items():
        golden.expect(f"after.{name}", weight)
    changed = {name for name, weight in weights.items() if not weight.equal(before[name])}
    assert changed == set(golden.settings["changed"])
