"""Packages that only an extra of this one installs."""

from importlib import import_module
from types import ModuleType


EXTRAS = {
    "train": ("datasets", "pyarrow", "aiohttp", "urllib3"),
    "eval": ("pandas", "matplotlib", "evaluate"),
    "demo": ("gguf",),
}


def require(module: str, package: str | None = None) -> ModuleType:
    """
    Import a module, given as to `importlib.import_module`, that needs packages of [`EXTRAS`], or is one.

    Raises:
        ModuleNotFoundError: one of them is not installed; the sentence names the extra that brings it.
    """
    try:
        return import_module(module, package)
    except ModuleNotFoundError as error:
        if sentence := advice(error):
            raise ModuleNotFoundError(sentence, name=error.name) from error
        raise


def advice(error: ModuleNotFoundError) -> str | None:
    """What to install, if it is one of the extras' packages that is missing; else `None`."""
    package = (error.name or "").split(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return (
                f"This needs the package {package}, which is not installed: pip install 'transformers-confu[{extra}]'."
            )
    return None
