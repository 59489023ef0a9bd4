"""The image encoder."""

from tests.golden.figures import Golden
from turbotalk_core.models.image_encoder import build_image_encoder


def test_equals_the_reference(golden: Golden) -> None:
    encoder = build_image_encoder(golden.under("w."), golden.settings["config"]["heads"])
    image_BCHW = golden["image"][:, :, 0]
    rows = encoder.prepare(image_BCHW)[:, :, : golden["preprocessed_row0"].shape[2]]
    golden.expect("preprocessed_row0", rows)
    golden.expect("out", encoder(image_BCHW))
