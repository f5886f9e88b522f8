"""A GGUF file becomes an ordinary Hugging Face folder, once: dequantised to float32 by transformers."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.errors import ModelError
from prunus.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGGER = logging.getLogger("prunus")
VERSIONS = (2, 3)
# In the folder that a GGUF became: what it was.
SOURCE = "prunus-source.json"


def fingerprint(path: Path) -> str:
    """The first 12 hex digits of the SHA-256 of the whole file: two fine-tunes may share name, header and size.

    Raises:
        ModelError: if the file is not a GGUF (checked first, so that nothing else is read to its end).
    """
    check_header(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()[:12]


def check_header(path: Path) -> None:
    """Refuse what does not begin like a little-endian GGUF of a known version.

    Raises:
        ModelError: naming what the file begins with.
    """
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file (it begins with {head[:4]!r}); download it again.")
    number = struct.unpack("<I", head[4:8])[0]
    if number not in VERSIONS:
        raise ModelError(f"{path} says GGUF version {number}; versions 2 and 3 can be read. Convert it with llama.cpp.")


def convert(target: Path, provide: Callable[[Path], Path]) -> Path:
    """`target`, made from a GGUF file if it is not there yet; then it is whole, for it is renamed into place last.

    Processes that convert at the same time wait for each other. What a killed run left behind is removed.

    Args:
        target: the folder to be.
        provide: gives the GGUF file, given a scratch folder that goes away afterwards.

    Raises:
        ModelError: if the file cannot be read, is truncated or of an unknown architecture, or the disk is full.
    """
    from filelock import FileLock

    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / ".lock"):
            if not target.is_dir():
                _build(target, provide)
    except OSError as problem:
        raise ModelError(
            f"The converted model cannot be written to {target.parent} ({problem}); "
            "set PRUNUS_CACHE to a folder with room."
        ) from problem
    return target


def _build(target: Path, provide: Callable[[Path], Path]) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    scratch = partial / "scratch"
    scratch.mkdir(parents=True)
    try:
        gguf = provide(scratch)
        LOGGER.info("Converting %s to a float32 folder, once (a minute for 135 M parameters)", gguf.name)
        start = time.perf_counter()
        _write(gguf, partial)
        shutil.rmtree(scratch)
        partial.replace(target)
        LOGGER.info("Converted in %.0f s: %s", time.perf_counter() - start, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(gguf: Path, folder: Path) -> None:
    """Read `gguf` with transformers and save model, generation config, tokenizer and a note of the origin."""
    model, tokenizer = _read(gguf)
    room = shutil.disk_usage(folder).free
    wanted = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    if room < wanted:
        raise OSError(f"{wanted / 1e9:.1f} GB are needed, {room / 1e9:.1f} GB are free")
    with quiet():
        _plain(model).save_pretrained(folder, max_shard_size="2GB")
        tokenizer.save_pretrained(folder)
    origin = {"file": gguf.name, "bytes": gguf.stat().st_size, "dtype": "float32"}
    (folder / SOURCE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _read(gguf: Path) -> tuple[PreTrainedModel, Any]:
    """Model, dequantised to float32, and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
    except ImportError as problem:
        raise ModelError(f"Reading {gguf.name} needs the package gguf: pip install gguf ({problem})") from problem
    except Exception as problem:
        # Any: the reader trusts what the file says of itself, so a damaged one fails in whatever way it comes to.
        raise ModelError(
            f"{gguf} cannot be read as a GGUF model ({type(problem).__name__}: {str(problem)[:200]}). It is truncated, "
            "or of an architecture that transformers does not read from GGUF; download it again or give a model folder."
        ) from problem
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{gguf} lacks {len(missing)} weights, first {missing[0]}; a split GGUF must be merged first.")
    return model, tokenizer


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that was never quantised: transformers refuses to save one that came from GGUF."""
    import torch

    config = model.config
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
