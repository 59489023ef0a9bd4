"""The files of networks that metrics are defined by, which the user supplies.

In: a folder. Out: the path of a file in it, and which file it is. Separate because these weights
are not ours to ship, and a number of another network is another metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.data.stage import hash_files
from turbotalk_core.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """A file that a metric needs.

    Attributes:
        what: it is.
        source: where it is known to be.
        sha256: of the public file; None where no public source tells it, or each user has their
            own.
    """

    what: str
    source: str
    sha256: str | None = None


INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
I3D = "i3d_torchscript.pt"
SYNCNET = "syncnet_v2.model"
FACE = "face.pt2"
EXPRESSION = "expression.pt2"

_OWN = "an export of your own (docs/evaluation.md says in which form)"

KNOWN_FILES: Mapping[str, KnownFile] = {
    INCEPTION: KnownFile(
        what="the Inception network of 2015, 2048 features a picture",
        source="https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    I3D: KnownFile(
        what="the I3D network of Kinetics-400 as TorchScript, 400 features a span",
        source="https://huggingface.co/flateon/FVD-I3D-torchscript",
    ),
    SYNCNET: KnownFile(
        what="SyncNet, 1024 features a window",
        source="https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
        sha256="961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
    ),
    FACE: KnownFile(what="a face detector, the same as of training.data filter", source=_OWN),
    EXPRESSION: KnownFile(
        what="a regressor of expression coefficients, such as the 64 of Deep3DFaceRecon",
        source=_OWN,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedFile:
    """A file that numbers were made with.

    Attributes:
        file: its name.
        bytes: its size.
        sha256: of its bytes.
        is_public: whether that is the SHA-256 of a public file; else only equal ones compare.
    """

    file: str
    bytes: int
    sha256: str
    is_public: bool


def find_weights(folder: Path, name: str) -> tuple[Path, UsedFile]:
    """Find a file, and make sure that it is what its name says.

    Args:
        folder: of the weights.
        name: one of ``KNOWN_FILES``.

    Returns:
        Its path, and what the report says of it.

    Raises:
        CheckpointError: there is no such file, or it is not the public one.
    """
    known, path = KNOWN_FILES[name], folder / name
    if not path.is_file():
        raise CheckpointError(
            f"there is no {name} in {folder}; it is {known.what}, and not ours to ship: put it "
            f"there from {known.source}"
        )
    facts = hash_files(name, (path,))
    used = UsedFile(**facts, is_public=known.sha256 is not None)
    if known.sha256 not in (None, used.sha256):
        raise CheckpointError(
            f"{path} has the SHA-256 {used.sha256}, not {known.sha256} of the public file, and "
            f"numbers of another network cannot be compared; download it again from {known.source}"
        )
    return path, used
