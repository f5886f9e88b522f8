"""Negative log-likelihood of tokens, without holding the logits of a long window and a large vocabulary at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 256 MiB of float32 logits: whole windows of 1,024 up to a vocabulary of 65,536; beyond that they come in pieces.
LOGIT_BYTES = 1 << 28


@dataclass(frozen=True)
class Pieces:
    """How a model's logits are had piece by piece: the module that makes hidden states, and positions at a time."""

    body: nn.Module
    rows: int


@torch.inference_mode()
def token_losses(model: PreTrainedModel, inputs: Tensor, targets: Tensor, *, pieces: Pieces | None = None) -> Tensor:
    """-log p(targets_t | inputs_0 … inputs_t), in float32.

    Args:
        model: a causal language model.
        inputs: ids int64 [1, positions].
        targets: ids int64 [predictions], the token after each position; as many as positions, or one fewer.
        pieces: from `plan_pieces`; None: all logits at once.

    Returns:
        float32 [predictions] on the model's device.
    """
    losses, done = [], 0
    for logits in _at_once(model, inputs) if pieces is None else _in_pieces(model, inputs, pieces):
        wanted = targets[done : done + len(logits)]
        # float32: a 16-bit log-softmax over 100,000 entries loses the third digit of the loss.
        losses.append(nn.functional.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="none"))
        done += len(logits)
    return torch.cat(losses)


@torch.inference_mode()
def plan_pieces(model: PreTrainedModel, inputs: Tensor, *, budget: int = LOGIT_BYTES) -> Pieces | None:
    """The way to keep logits within `budget` bytes, or None if they fit anyway or the model allows no pieces.

    A model is a body, a head and often something after the head (soft cap, scale), known only to its own `forward`.
    In pieces, `forward` runs once with `logits_to_keep=1`, the body's output is noted, and then it runs again for each
    piece of positions with the body *answering from the note*: head and what follows are always the model's own code.
    Both ways are compared at the last position here; a model where they differ gets the plain way.

    Args:
        model: a causal language model.
        inputs: ids int64 [1, positions], as long as the longest window.
        budget: bytes of float32 logits that may exist at once.
    """
    rows = max(1, budget // (4 * model.config.get_text_config().vocab_size))
    if rows >= inputs.shape[1] or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    # Most models call their base model; OPT calls the decoder inside it.
    for body in (model.base_model, model.get_decoder()):
        if isinstance(body, nn.Module) and body is not model and _answers_alike(model, inputs, body):
            return Pieces(body, rows)
    return None


def _answers_alike(model: PreTrainedModel, inputs: Tensor, body: nn.Module) -> bool:
    """True if the last position's logits are the same from a whole forward and from the noted output of `body`."""
    output, direct = _note(model, inputs, body)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.shape[:2] != inputs.shape:
        return False
    replayed = _replay(model, inputs, body, output, slice(inputs.shape[1] - 1, None))
    if replayed.shape != direct.shape:
        return False
    # 2 % of the largest: products of 1 row and of 1,024 may round differently, in 16 bits by that much.
    return bool((replayed - direct).abs().max() <= 0.02 * direct.abs().max())


def _at_once(model: PreTrainedModel, inputs: Tensor) -> Iterator[Tensor]:
    """Logits [256, vocabulary] at a time, so that the softmax needs no second copy of all of them."""
    yield from model(input_ids=inputs, use_cache=False).logits[0].split(256)


def _in_pieces(model: PreTrainedModel, inputs: Tensor, pieces: Pieces) -> Iterator[Tensor]:
    output, _ = _note(model, inputs, pieces.body)
    for start in range(0, inputs.shape[1], pieces.rows):
        yield _replay(model, inputs, pieces.body, output, slice(start, start + pieces.rows))


def _note(model: PreTrainedModel, inputs: Tensor, body: nn.Module) -> tuple[Any, Tensor]:
    """The output of `body` (None if it is not called), and the logits [1, vocabulary] of the last position."""
    seen: list[Any] = []
    handle = body.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[0]
    finally:
        handle.remove()
    return seen[-1] if seen else None, logits


def _replay(model: PreTrainedModel, inputs: Tensor, body: nn.Module, output: Any, kept: slice) -> Tensor:
    """Logits [kept, vocabulary] of some positions, from the noted output of the body."""
    piece = type(output)(**{**output, "last_hidden_state": output.last_hidden_state[:, kept]})
    with answering(body, piece):
        return model(input_ids=inputs[:, kept], use_cache=False).logits[0]


@contextmanager
def answering(body: nn.Module, output: Any) -> Iterator[None]:
    """While open, calling `body` gives `output`; then it is as before."""
    own = body.__dict__.get("forward")  # set where accelerate has wrapped the module
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own
