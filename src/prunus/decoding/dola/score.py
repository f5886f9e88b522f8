"""Log-likelihood of given continuations, plain and contrasted, from the same forward passes (multiple choice)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prunus.decoding.dola.contrast import contrast, plausible
from prunus.decoding.dola.options import Dola
from prunus.decoding.dola.states import Layers, Streams, logits
from prunus.errors import CalibrationError
from prunus.evaluation.losses import LOGIT_BYTES


@dataclass(frozen=True)
class Scoring:
    """How contrasted scores are summed.

    Attributes:
        post_softmax: make the contrast a distribution over the whole vocabulary before implausible tokens are marked.
        implausible: score of a token that is not plausible.
    """

    post_softmax: bool = False
    implausible: float = -1000.0


@dataclass(frozen=True)
class Score:
    """Of one continuation; sums over its tokens, without division by their number.

    Attributes:
        plain: log-likelihood of the model itself, in nats.
        contrasted: the same of DoLa.
        layers: the premature layer of each token.
    """

    plain: float
    contrasted: float
    layers: tuple[int, ...]


def encode(tokenizer: Any, prefix: str, continuation: str) -> tuple[list[int], int]:
    """Ids of both as one text, and the place of the first token that has a character of the continuation.

    Tokenised once: a tokenizer may merge across the seam, and the prefix alone would then have other tokens.

    Raises:
        CalibrationError: a tokenizer without offsets, or nothing before or in the continuation.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise CalibrationError("Scoring needs a fast tokenizer (tokenizer.json), which knows where its tokens lie.")
    made = tokenizer(prefix + continuation, return_offsets_mapping=True)
    starts = [index for index, (_, end) in enumerate(made["offset_mapping"]) if end > len(prefix)]
    if not starts or starts[0] == 0:
        raise CalibrationError(
            f"There is nothing to score in {(prefix + continuation)[-60:]!r}: a part of it is empty."
        )
    return list(made["input_ids"]), starts[0]


@torch.inference_mode()
def score(
    found: Layers, sequences: Sequence[tuple[list[int], int]], how: Dola, scoring: Scoring | None = None
) -> list[Score]:
    """Scores of several continuations; what their ids have in common at the start is read once.

    Args:
        found: the model.
        sequences: ids, and the place of the first token that counts (`encode`).
        how: layers, `relative_top` and so on.
        scoring: see `Scoring`.

    Raises:
        ModelError: a model whose inner layers cannot be read.
        RecipeError: layers outside the model.
    """
    scoring = scoring or Scoring()
    layers = how.candidates(len(found.blocks), tied=found.tied)
    ids = [row for row, _ in sequences]
    # Each first token's predictor must still be in its own part.
    shared = min(_common(ids), min(start for _, start in sequences) - 1)
    if getattr(found.model, "_is_stateful", False):  # a state cannot be copied for each row
        shared = 0
    device = found.model.device
    cached: dict[str, Any] = {"use_cache": False}
    if shared:
        cache = found.body(torch.tensor([ids[0][:shared]], device=device), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids))
        cached = {"use_cache": True, "past_key_values": cache}
    # Padded on the right, where causal attention never looks from the left.
    rows = pad_sequence([torch.tensor(row[shared:]) for row in ids], batch_first=True).to(device)
    with Streams(found, layers, norm=how.norm, positions=slice(None), beside=False) as streams:
        found.body(rows, **cached)
        premature = streams.premature()
        mature = streams.output.last_hidden_state
    wanted = [
        (row, place - 1 - shared) for row, (own, start) in enumerate(sequences) for place in range(start, len(own))
    ]
    row, place = torch.tensor(wanted, device=device).unbind(1)
    states = torch.cat([mature[None], premature])[:, row, place]
    made = [
        _pick(both, rows[row, place + 1][chunk], how, scoring) for both, chunk in _logits(found, streams.output, states)
    ]
    plain, contrasted, chosen = (torch.cat(part).tolist() for part in zip(*made, strict=True))
    results, done = [], 0
    for own, start in sequences:
        part = slice(done, done := done + len(own) - start)
        picked = tuple(layers[index] for index in chosen[part])
        results.append(Score(math.fsum(plain[part]), math.fsum(contrasted[part]), picked))
    return results


def _common(rows: Sequence[list[int]]) -> int:
    """How many ids all rows have in common at the start."""
    for place, ids in enumerate(zip(*rows, strict=False)):
        if len(set(ids)) > 1:
            return place
    return min(map(len, rows))


def _logits(found: Layers, output: Any, states: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Logits [1 + layers, some, vocabulary] of states [1 + layers, positions, width], and which positions."""
    vocabulary = found.model.config.get_text_config().vocab_size
    some = max(1, LOGIT_BYTES // (4 * vocabulary * len(states)))
    for first in range(0, states.shape[1], some):
        part = slice(first, first + some)
        yield logits(found, output, states[:, part]), part


def _pick(both: Tensor, tokens: Tensor, how: Dola, scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
    """Plain and contrasted score and index of the layer of each token; `both` is [1 + layers, tokens, vocabulary]."""
    scores, log_p, chosen = contrast(both[0], both[1:], how)
    if scoring.post_softmax:
        scores = scores.log_softmax(-1)
    scores = scores.masked_fill(~plausible(log_p, how.relative_top), scoring.implausible)
    pick = tokens[:, None]
    return log_p.gather(1, pick)[:, 0].double(), scores.gather(1, pick)[:, 0].double(), chosen
