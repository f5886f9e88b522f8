"""Loads a whole model for a measurement, by stock transformers and from safetensors only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prunus.errors import ModelError, RecipeError, near
from prunus.models.modelling import ours
from prunus.models.quiet import quiet
from prunus.models.source import is_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(device: str) -> torch.device:
    """The device as PyTorch knows it.

    Raises:
        RecipeError: if PyTorch does not know it or this machine lacks it; use cpu.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0][:120]
        raise RecipeError(f"The device {device!r} cannot be used here ({reason}); use cpu.") from problem
    return found


def check_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The dtype to compute in: "auto" is float32 on a CPU (16-bit products are slow there), else the checkpoint's own.

    Raises:
        RecipeError: an unknown name.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise RecipeError(f"Unknown dtype {dtype!r}.{near(dtype, ['auto', *DTYPES])}")
    return DTYPES[dtype]


def load_model(
    folder: Path, *, device: str = "cpu", dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model in `folder`, in evaluation mode, on `device`.

    Raises:
        ModelError: no causal language model, damaged weights, or weights that the architecture expects and the folder
            lacks (transformers would fill them with random numbers).
        RecipeError: unusable device or dtype.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from prunus.models.fitted import is_fitted, load_fitted

    place = check_device(device)
    kind = check_dtype(dtype, place)
    if is_packed(folder):
        from prunus.packed.model import load_dense

        return load_dense(folder, device=device, dtype=dtype)
    trust_remote_code = trust_remote_code or ours(folder)
    if is_fitted(folder):
        model, _ = load_fitted(folder, _stored(folder) if isinstance(kind, str) else kind, place, trust_remote_code)
        return model
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=kind, use_safetensors=True, output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        raise ModelError(f"{folder} cannot be loaded as a causal language model: {str(problem)[:300]}") from problem
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of its architecture, first {missing[0]}; copy it again."
        )
    dropped = sorted(name for name in report["unexpected_keys"] if name.endswith(".bias"))
    if dropped:
        raise ModelError(
            f"{folder} holds {len(dropped)} biases that its architecture has no place for, first {dropped[0]}; "
            "transformers would drop them and compute something else. Its config.json does not belong to its weights."
        )
    return model.to(place).eval()


def _stored(folder: Path) -> torch.dtype:
    """The dtype of most tensors in a folder."""
    from collections import Counter

    from prunus.models.checkpoint import Checkpoint

    found = Counter(stored.dtype for stored in Checkpoint.open(folder).tensors.values())
    return found.most_common(1)[0][0]


def _packed(folder: Path, *, device: str, dtype: str, trust_remote_code: bool) -> Any:
    from prunus.packed.running import open_model

    if device != "cpu" or dtype not in ("auto", "float32"):
        raise RecipeError(f"The packed engine runs on the CPU in float32, not on {device} in {dtype}; leave both out.")
    return open_model(folder)


# What computes a model -> how it is loaded.
ENGINES: dict[str, Callable[..., Any]] = {"transformers": load_model, "packed": _packed}
