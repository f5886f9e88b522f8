"""What `prunus recover` and `prunus merge` print for people."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from prunus.progress import clock
from prunus.text import bytes_text, pairs, percent, wrap

Result = Mapping[str, Any]


def recover_text(result: Result) -> str:
    """What was trained, what it gained, that no zero was lost, and what to do next."""
    loss, zeros, text = result["loss"], result["zeros"], result["text"]
    patterns = ", ".join(f"{count} matrices {name}" for name, count in zeros["patterns"].items())
    facts = {
        "trained": f"{result['trainable']:,} values, {100 * result['trainable_share']:.4f} % of the model",
        "held-out": f"loss {loss['before']:.4f} before, {loss['after']:.4f} after: perplexity "
        f"{_exp(loss['before'])} → {_exp(loss['after'])}",
        "zeros": f"{zeros['after']:,} of {zeros['before']:,} are still zero ({percent(result['sparsity'])} of the "
        f"matrices; {patterns})"
        if zeros["before"]
        else "none to keep: no single weights were removed",
        "text": f"{text['rows']:,} sequences of {text['length']} tokens of {text['source']}",
        "training": _training(result["training"]),
        **_guard(result.get("guard")),
        "took": clock(result["seconds"]["total"]),
        "memory": f"{bytes_text(result['peak_rss_bytes'])} at the peak",
    }
    head = f"Recovered {result['model']} with {result['method']} into {result['out']}"
    warnings = [wrap(f"Warning: {warning}") for warning in result.get("warnings") or ()]
    dense = str(result.get("dense") or result["model"])
    following = f"Next:\n  prunus evaluate {shlex.quote(str(result['out']))} --baseline {shlex.quote(dense)}"
    return "\n\n".join([head, pairs(facts), *warnings, following])


def merge_text(result: Result) -> str:
    """Sparsity before and after, the patterns, and what the merge did to the logits."""
    zeros, loss, facts = result["zeros"], result["loss"], result["training"]
    shown = {
        "sparsity": f"{percent(zeros['before'] / result['matrix_weights'])} before, "
        f"{percent(result['sparsity'])} after: {zeros['after']:,} of {zeros['before']:,} zeros",
        "patterns": ", ".join(f"{count} matrices {name}, valid" for name, count in zeros["patterns"].items()),
        "held-out": f"loss {loss['before']:.4f} before, {loss['after']:.4f} after",
    }
    if "merge_gap" in facts:
        shown["logits"] = (
            f"moved by {facts['merge_gap']:.2g} of the largest, against the model with the adapter beside it"
        )
        shown["plain merge"] = f"would have left a sparsity of {percent(facts['sparsity_of_plain_merge'])}"
    head = f"Merged {facts['adapter']} into {result['model']} under its masks: {result['out']}"
    return "\n\n".join([head, pairs(shown), *(wrap(f"Warning: {text}") for text in result.get("warnings") or ())])


def _guard(found: Result | None) -> dict[str, str]:
    """What the limit on the perplexity was held against, if there was one."""
    if not found:
        return {}
    spoken = f"; it writes: “{found['sample']}”" if found.get("sample") else ""
    return {
        "quality": f"perplexity {found['perplexity']:,.2f}, {found['ratio']:.2f} times the dense model's "
        f"{found['dense']:,.2f} (at most {found['limit']:g} times allowed){spoken}"
    }


def _training(facts: Result) -> str:
    """`120 steps at a rate of 0.0005, best after 100`, of what is known."""
    parts = []
    if "steps" in facts:
        parts.append(f"{facts['steps']} steps")
    if facts.get("lr") is not None:
        parts.append(f"peak learning rate {facts['lr']:g}")
    if facts.get("best_step") is not None:
        parts.append(f"best after step {facts['best_step']}")
    if facts.get("stopped"):
        parts.append(str(facts["stopped"]))
    return ", ".join(parts)


def _exp(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 300 else "over 1e130"
