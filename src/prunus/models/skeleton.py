"""The model that a configuration describes, built without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from prunus.errors import ModelError
from prunus.models.modelling import ours


def skeleton(folder: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder in evaluation mode: parameters on the meta device, buffers real.

    Args:
        folder: holds a `config.json`.
        dtype: the dtype that its parameters shall have once loaded.
        trust_remote_code: run model code that lies in the folder.

    Raises:
        ModelError: the configuration is unknown, quantised, or needs code from the folder that was not allowed.
    """
    trusted = trust_remote_code or ours(folder)
    return skeleton_of(read_config(folder, trusted), folder, dtype, trusted)


def skeleton_of(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The same for a configuration that is read already; `folder` is named in complaints."""
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{folder} is quantised; prune the unquantised model and quantise the result.")
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = _build(config, folder, dtype, trust_remote_code)
    model.tie_weights()
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False  # a block is run twice on the same tokens; a cache would hold the first run's
    return model.requires_grad_(False).eval()


def parameter_count(model: PreTrainedModel) -> int:
    """Number of a model's weights, tied ones counted once."""
    return sum(value.numel() for name, value in model.named_parameters() if name not in model.all_tied_weights_keys)


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a folder.

    Raises:
        ModelError: it is missing, not JSON, of a model type that transformers does not know, or needs remote code.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        # Any: transformers trusts the file, so a damaged one fails in whatever way it comes to.
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ModelError(
                f"{folder} needs Python code that lies in the folder. Read it, and if you trust it, "
                "allow it with --trust-remote-code."
            ) from None
        raise ModelError(f"{folder}: config.json cannot be used: {reason[:300]}") from None


def config_of(written: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a class of transformers, from the values of a config.json.

    Raises:
        ModelError: transformers does not know the type.
    """
    values = dict(written)
    kind = str(values.pop("model_type", ""))
    try:
        return AutoConfig.for_model(kind, **values)
    except ValueError as error:
        raise ModelError(f"transformers cannot build a configuration of the type {kind!r}: {error}") from None


def _build(config: PreTrainedConfig, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The class that the checkpoint itself names, or the one that transformers' causal-LM table gives."""
    name = (getattr(config, "architectures", None) or [""])[0]
    known = getattr(transformers, name, None) if name else None
    try:
        if known is not None and not trust_remote_code:
            return known._from_config(config, dtype=dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # any, as above: heads of no width divide by zero, a negative size is no tensor
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder}: transformers cannot build this model: {reason[:300]}") from None
