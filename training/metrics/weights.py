"""Weight files that define the metrics; the user supplies them.

Input: a folder. Output: the path of a file in it, and its identification. These weights cannot be
shipped with this project, and another network would make another metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.data.resumable_stage import hash_files
from turbotalk_core.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """Weight file that a metric needs.

    Attributes:
        what: description of the file.
        source: where the file is published.
        sha256: SHA-256 of the public file; None if no public source states it, or each user has a
            file of their own.
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
    """Weight file that was used for a measurement.

    Attributes:
        file: name of the file.
        bytes: size in bytes.
        sha256: SHA-256 of its content.
        is_public: whether this is the SHA-256 of a public file; otherwise numbers are comparable
            only with those from an equal file.
    """

    file: str
    bytes: int
    sha256: str
    is_public: bool


def find_weights(folder: Path, name: str) -> tuple[Path, UsedFile]:
    """Find a weight file and verify it.

    Args:
        folder: folder of the weights.
        name: one of ``KNOWN_FILES``.

    Returns:
        Path of the file, and its entry for the report.

    Raises:
        CheckpointError: if the file does not exist, or is not the public one.
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
