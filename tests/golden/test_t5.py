"""The text encoder."""

from tests.golden.figures import Golden
from turbotalk_core.models.text_encoder import build_text_encoder


def test_equals_the_reference(golden: Golden) -> None:
    encoder = build_text_encoder(golden.under("w."))
    golden.expect("out", encoder(golden["ids"], golden["mask"]))
