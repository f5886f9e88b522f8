"""The mathematics of DoLa on logits alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunus.decoding.dola.options import Dola

# Log-probability of a token that a layer rules out: its probability is 0, and 0 * NEVER is, where 0 * inf is no number.
NEVER = -1e4


def jensen_shannon(mature: Tensor, premature: Tensor) -> Tensor:
    """KL(p‖m)/2 + KL(q‖m)/2 with m = (p + q)/2, in nats, in [0, ln 2] (Chuang et al. 2023, eq. 3).

    Args:
        mature: log p, float32 [rows, vocabulary].
        premature: log q, float32 [layers, rows, vocabulary].

    Returns:
        float32 [layers, rows].
    """
    p, total = mature.exp(), premature.exp()
    # Element by element p log p + q log q - (p + q) log((p + q) / 2): each is at least 0 but for rounding, so nothing
    # cancels in the sum. In place, since layers x vocabulary numbers are read from memory each time. The smallest
    # normal number stands in where a probability underflows.
    parts = torch.addcmul(p * mature, total, premature)
    total += p
    parts.addcmul_(total, total.mul(0.5).clamp_min_(torch.finfo(total.dtype).tiny).log_(), value=-1)
    return parts.sum(-1).mul_(0.5).clamp_(0, math.log(2))


def exchanged(mature: Tensor, premature: Tensor) -> Tensor:
    """KL(m‖p)/2 + KL(m‖q)/2, and the mean over the vocabulary where a sum belongs: what the published code computes.

    Arguments and result as in `jensen_shannon`, without its upper bound.
    """
    m = (mature.exp() + premature.exp()) * 0.5
    log_m = m.clamp_min(torch.finfo(m.dtype).tiny).log()
    return (m * (2 * log_m - mature - premature)).mean(-1) * 0.5


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
    log_p = mature.log_softmax(-1).clamp_min_(NEVER)
    log_q = premature.float().log_softmax(-1).clamp_min_(NEVER)
    chosen = torch.zeros(len(log_p), dtype=torch.int64, device=log_p.device)
    if len(log_q) > 1:
        chosen = DIVERGENCES[how.compat](log_p, log_q).argmax(0)
    difference = log_p - log_q[chosen, torch.arange(len(log_p), device=log_p.device)]
    return difference.masked_fill_(mature == -math.inf, -math.inf), log_p, chosen


def next_scores(mature: Tensor, premature: Tensor, how: Dola) -> tuple[Tensor, Tensor]:
    """Scores of the next token: the difference where it is plausible, -inf elsewhere (eq. 5), and the index chosen.

    Arguments and shapes as in `contrast`.
    """
    difference, log_p, chosen = contrast(mature, premature, how)
    return difference.masked_fill_(~plausible(log_p, how.relative_top), -math.inf), chosen
