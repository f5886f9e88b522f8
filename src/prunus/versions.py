"""Versions of all that has a say in the numbers."""

from __future__ import annotations

import platform
from importlib.metadata import version

from prunus import __version__

# Packages under which an unfinished run may be continued: another of these makes other bits.
DECISIVE = ("prunus", "torch", "transformers")


def versions() -> dict[str, str]:
    """Package → version, and Python's own."""
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors", "accelerate")}
    return {"prunus": __version__, **packages, "python": platform.python_version()}


def decisive() -> dict[str, str]:
    """Those of `DECISIVE`."""
    known = versions()
    return {name: known[name] for name in DECISIVE}
