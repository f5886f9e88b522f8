"""The loss that a model's gradients and probes are about."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from prunus.errors import ModelError


def language_loss(logits: Tensor, ids: Tensor, ignored: int | None = None) -> Tensor:
    """Mean cross-entropy of the next token over all samples, float32, as causal language models define it.

    Args:
        logits: `[samples, length, vocabulary]`.
        ids: `[samples, length]`.
        ignored: a token that is not to be predicted, such as the place of an image.

    Raises:
        ModelError: there is not one row of logits for each token.
    """
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ModelError(
            "This model gives no logits for every token, so it has no language-modelling loss. Methods and allocations "
            "that look at the loss need a language-model head (or images and texts for a model of both)."
        )
    targets = ids[:, 1:].clone()
    if ignored is not None:
        targets[targets == ignored] = -100
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def model_loss(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The loss of a model in memory on named inputs: its own contrastive one (CLIP), else that of the next token.

    Raises:
        ModelError: it has neither.
    """
    known = signature(model.forward).parameters
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if "return_loss" in known:
        extra["return_loss"] = True
    output = model(**inputs, **extra)
    if getattr(output, "loss", None) is not None:
        return output.loss
    logits = getattr(output, "logits", None)
    if logits is None or "input_ids" not in inputs:
        raise ModelError(f"{type(model).__name__} gives no loss: it has neither logits nor a loss of its own.")
    return language_loss(logits, inputs["input_ids"], getattr(model.config, "image_token_id", None))
