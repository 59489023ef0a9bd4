"""Import of packages that one feature needs and a host may lack.

ComfyUI adds and drops packages between versions, and people run it with what they have. So nothing
here is imported before a feature needs it, and all else works without it. Separate because every
room imports such packages in this one way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingToolError


@contextmanager
def required_for(feature: str) -> Iterator[None]:
    """Raise a readable error if an import within the ``with`` block fails.

    Args:
        feature: what needs the imports, as the subject of the error's sentence: a noun in the
            singular and, in brackets, how to do without it.

    Yields:
        None.

    Raises:
        MissingToolError: if a package is not installed, or is installed incompletely.
    """
    try:
        yield
    except ImportError as error:
        package = _find_name(error).partition(".")[0]
        state = "is not installed"
        if not isinstance(error, ModuleNotFoundError):
            state = f"cannot be imported ({error})"
        raise MissingToolError(
            f"{feature} needs the package {package}, which {state}; install it: pip install "
            f"{package}, for ComfyUI into the Python that runs it"
        ) from error


def _find_name(error: ImportError) -> str:
    """Return the module that could not be imported; transformers wraps the error that names it."""
    while error.name is None and isinstance(error.__cause__, ImportError):
        error = error.__cause__
    return error.name or "named below"
