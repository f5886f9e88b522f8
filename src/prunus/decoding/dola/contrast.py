"""The mathematics of DoLa on logits alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from prunus.decoding.dola.options import Dola

# Log-probability of a token that a layer rules out: its probability is 0, and 0 * NEVER is, where 0 * inf is no number.
NEVER = -1e4


def jensen_shannon(mature: Tensor, premature: Iterable[Tensor]) -> Tensor:
    """KL(p‖m)/2 + KL(q‖m)/2 with m = (p + q)/2, in nats, in [0, ln 2] (Chuang et al. 2023, eq. 3).

    Args:
        mature: log p, float32 [rows, vocabulary].
        premature: log q of each layer, float32 [rows, vocabulary]; one is read at a time.

    Returns:
        float32 [layers, rows].
    """
    # Element by element p log p + q log q - (p + q) log((p + q) / 2): each is at least 0 but for rounding, so nothing
    # cancels in the sum. Layer by layer and in place: one layer's numbers stay in the core's cache from step to step,
    # where those of all layers are fetched from memory, into pages fresh from the system, at each. The smallest normal
    # number stands in where both probabilities underflow.
    p = mature.exp()
    own = p * mature
    p += torch.finfo(p.dtype).tiny
    found = []
    for log_q in premature:
        total = log_q.exp()
        parts = torch.addcmul(own, total, log_q)
        total += p
        found.append(parts.addcmul_(total, total.mul(0.5).log_(), value=-1).sum(-1))
    return torch.stack(found).mul_(0.5).clamp_(0, math.log(2))


def exchanged(mature: Tensor, premature: Iterable[Tensor]) -> Tensor:
    """KL(m‖p)/2 + KL(m‖q)/2, and the mean over the vocabulary where a sum belongs: what the published code computes.

    Arguments and result as in `jensen_shannon`, without its upper bound.
    """
    p = mature.exp()
    found = []
    for log_q in premature:
        m = (p + log_q.exp()) * 0.5
        log_m = m.clamp_min(torch.finfo(m.dtype).tiny).log()
        found.append((m * (2 * log_m - mature - log_q)).mean(-1) * 0.5)
    return torch.stack(found)


DIVERGENCES = {"exact": jensen_shannon, "published": exchanged}


def plausible(mature: Tensor, relative_top: float, least: int = 1) -> Tensor:
    """True for tokens with at least `relative_top` times the probability of the likeliest (eq. 4), at least `least`.

    Args:
        mature: log p, float32 [rows, vocabulary].
        relative_top: in [0, 1]; 0 keeps all.
        least: so many likeliest are always kept.
    """
    if relative_top == 0:
        return torch.ones_like(mature, dtype=torch.bool)
    threshold = mature.amax(-1, keepdim=True) + math.log(relative_top)
    if least > 1:
        threshold = torch.minimum(threshold, mature.topk(least, dim=-1).values[..., -1:])
    return mature >= threshold


def contrast(mature: Tensor, premature: Tensor, how: Dola) -> tuple[Tensor, Tensor, Tensor]:
    """Log p - log q_M of every token, M being the premature layer that differs most from the mature one, row by row.

    Args:
        mature: logits [rows, vocabulary]; -inf where the model rules a token out.
        premature: logits [layers, rows, vocabulary].
        how: `compat` is used.

    Returns:
        The difference float32 [rows, vocabulary], -inf where the mature layer rules a token out; log p float32 [rows,
        vocabulary]; and the index of the chosen layer in `premature` int64 [rows], the lowest of equals.
    """
    mature = mature.float()
    log_p = _log_probabilities(mature)
    chosen = torch.zeros(len(log_p), dtype=torch.int64, device=log_p.device)
    if len(premature) > 1:
        chosen = DIVERGENCES[how.compat](log_p, map(_log_probabilities, premature)).argmax(0)
    # Of the chosen layer once more, so that those of all layers are never held together.
    difference = log_p - _log_probabilities(premature[chosen, torch.arange(len(log_p), device=log_p.device)])
    return difference.masked_fill_(mature == -math.inf, -math.inf), log_p, chosen


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).clamp_min_(NEVER)


def next_scores(mature: Tensor, premature: Tensor, how: Dola) -> tuple[Tensor, Tensor]:
    """Scores of the next token: the difference where it is plausible, -inf elsewhere (eq. 5), and the index chosen.

    Arguments and shapes as in `contrast`.
    """
    difference, log_p, chosen = contrast(mature, premature, how)
    return difference.masked_fill_(~plausible(log_p, how.relative_top), -math.inf), chosen
