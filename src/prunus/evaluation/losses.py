"""Negative log-likelihood of tokens, without holding the logits of a long window and a large vocabulary at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 256 MiB of float32 logits: whole windows of 1,024 up to a vocabulary of 65,536; beyond that they come in pieces.
LOGIT_BYTES = 1 << 28


@torch.inference_mode()
def token_losses(model: PreTrainedModel, inputs: Tensor, targets: Tensor, *, rows: int | None = None) -> Tensor:
    """-log p(targets_t | inputs_0 … inputs_t), in float32.

    Args:
        model: a causal language model.
        inputs: ids int64 [1, positions].
        targets: ids int64 [predictions], the token after each position; as many as positions, or one fewer.
        rows: positions whose logits may exist at once, as `piece_rows` says; None: all.

    Returns:
        float32 [predictions] on the model's device.
    """
    if rows is None:
        logits = model(input_ids=inputs, use_cache=False).logits[0]
        pieces: Iterator[Tensor] = iter(logits.split(256))
    else:
        output, _ = _body(model, inputs)
        pieces = (_head(model, inputs, output, start, rows) for start in range(0, inputs.shape[1], rows))
    losses, done = [], 0
    for logits in pieces:
        wanted = targets[done : done + len(logits)]
        # float32: a 16-bit log-softmax over 100,000 entries loses the third digit of the loss.
        losses.append(nn.functional.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="none"))
        done += len(logits)
    return torch.cat(losses)


@torch.inference_mode()
def piece_rows(model: PreTrainedModel, inputs: Tensor, *, budget: int = LOGIT_BYTES) -> int | None:
    """How many positions at a time, or None if all logits fit in `budget` bytes or the model allows no pieces.

    A model is body, head and often something after the head (soft cap, scale), known only to its own `forward`. In
    pieces, `forward` runs once with `logits_to_keep=1`, the body's output is noted, and then it runs again for each
    piece of positions with the body *answering from the note*: head and what follows are always the model's own code.
    Both ways are compared at the last position here; a model where they differ gets the plain way.
    """
    vocabulary = model.config.get_text_config().vocab_size
    positions = inputs.shape[1]
    rows = max(1, budget // (4 * vocabulary))
    if rows >= positions or model.base_model is model:
        return None
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    output, direct = _body(model, inputs)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.shape[:2] != inputs.shape:
        return None
    replayed = _head(model, inputs, output, positions - 1, 1)
    # 2 % of the largest: products of 1 row and of 1,024 may round differently, in 16 bits by that much.
    alike = (replayed - direct[-1:]).abs().max() <= 0.02 * direct.abs().max()
    return rows if replayed.shape == direct[-1:].shape and bool(alike) else None


def _body(model: PreTrainedModel, inputs: Tensor) -> tuple[Any, Tensor]:
    """The body's output, and the logits [kept, vocabulary] of the last position."""
    seen: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[0]
    finally:
        handle.remove()
    return seen[-1], logits


def _head(model: PreTrainedModel, inputs: Tensor, output: Any, start: int, rows: int) -> Tensor:
    """Logits [rows, vocabulary] of the positions from `start` on, from the noted output of the body."""
    kept = slice(start, start + rows)
    piece = type(output)(**{**output, "last_hidden_state": output.last_hidden_state[:, kept]})
    with _answering(model.base_model, piece):
        return model(input_ids=inputs[:, kept], use_cache=False).logits[0]


@contextmanager
def _answering(body: nn.Module, output: Any) -> Iterator[None]:
    """While open, calling `body` gives `output`; then it is as before."""
    own = body.__dict__.get("forward")  # set where accelerate has wrapped the module
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own
