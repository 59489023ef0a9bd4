"""What several tests of the training share."""

import os
import shutil

import pytest

MISSING = "espeak-ng is not installed; these tests speak with it (apt-get install espeak-ng)"


@pytest.fixture
def _espeak() -> None:
    if shutil.which("espeak-ng") is None:
        if os.environ.get("CI") == "true":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
