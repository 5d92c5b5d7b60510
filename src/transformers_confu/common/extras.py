"""Packages that only an extra of this one installs."""

from importlib import import_module
from types import ModuleType


EXTRAS = {
    "train": ("datasets", "aiohttp"),
    "eval": ("pandas", "matplotlib", "evaluate"),
    "demo": ("gguf",),
}


def require(*packages: str) -> ModuleType:
    """
    Import packages of [`EXTRAS`], and return the last.

    Raises:
        ModuleNotFoundError: one is not installed; the sentence names the extra that brings it.
    """
    for package in packages:
        try:
            module = import_module(package)
        except ModuleNotFoundError as error:
            if sentence := advice(error):
                raise ModuleNotFoundError(sentence, name=error.name) from error
            raise
    return module


def advice(error: ModuleNotFoundError) -> str | None:
    """What to install when one of the extras' packages is missing; `None` for any other module."""
    package = (error.name or "").split(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return (
                f"This needs the package {package}, which is not installed: pip install 'transformers-confu[{extra}]'."
            )
    return None
