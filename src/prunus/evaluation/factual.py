"""How often a model prefers what is true, plain and by DoLa, from the same forward passes."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prunus.data.tokens import load_tokenizer, positions
from prunus.decoding.dola.options import Dola
from prunus.decoding.dola.score import Score, Scoring, encode, score
from prunus.decoding.dola.states import Layers
from prunus.errors import CalibrationError, RecipeError
from prunus.evaluation.factual_data import SOURCES, Item, read_items
from prunus.evaluation.loading import load_model
from prunus.models.source import locate, read_config
from prunus.progress import Progress, Silent
from prunus.versions import decisive

# Of the published evaluation: relative_top and how scores are summed.
SETTINGS = {"truthfulqa": (0.0, Scoring()), "factor": (0.1, Scoring(post_softmax=True))}


def judge(  # noqa: PLR0913 - one argument for each thing that is part of the result
    model: str | Path,
    task: str,
    folder: Path,
    how: Dola | None = None,
    *,
    baseline: str | Path | None = None,
    preamble: str | None = None,
    limit: int | None = None,
    machine: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Multiple choice on TruthfulQA or FACTOR.

    Args:
        model: folder, `.gguf`, alias or hub id.
        task: truthfulqa, factor_news or factor_expert.
        folder: holds the data.
        how: DoLa's layers, norm and compat, None: the task's published layers; `relative_top` is always the task's own
            (0 for TruthfulQA, 0.1 for FACTOR).
        baseline: judged first on the same items, usually the dense model.
        preamble: text before every item, such as examples; None: what the published evaluation puts there, which is
            six questions for TruthfulQA and nothing for FACTOR.
        limit: only the first so many items.
        machine: `device`, `dtype`, `trust_remote_code`.
        progress: told after each item.

    Returns:
        A JSON object: model, task, items, preamble (published, own or none), dola, plain and contrasted (each metric →
        {mean, stderr}), gain (contrasted minus plain, paired), chosen (layer → tokens), seconds, versions and, where
        asked, baseline.

    Raises:
        PrunusError: data, model or layers that cannot be used.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"The limit is at least 1, not {limit}.")
    items = read_items(task, folder, preamble=preamble, limit=limit)
    relative_top, scoring = SETTINGS[task.partition("_")[0]]
    how = replace(how or Dola(SOURCES[task].layers), relative_top=relative_top)
    chosen = SOURCES[task].preamble if preamble is None else preamble
    before = ("published" if chosen == SOURCES[task].preamble else "own") if chosen else "none"
    names = [str(model)] if baseline is None else [str(baseline), str(model)]
    places = [locate(name, trust_remote_code=bool(machine and machine.get("trust_remote_code"))) for name in names]
    tokenizers = [load_tokenizer(place) for place in places]  # so that nothing is missing behind hours of work
    results = []
    for name, place, tokenizer in zip(names, places, tokenizers, strict=True):
        found = Layers(load_model(place, **(machine or {})))
        limit_ = positions(read_config(place)) or math.inf
        begun = time.perf_counter()
        scores = _scores(
            found, tokenizer, items, how, scoring, limit_, progress or Silent(), f"{task} {Path(name).name}"
        )
        layers = how.candidates(len(found.blocks), tied=found.tied)
        results.append(
            {"model": name, "task": task, "items": len(items), "preamble": before}
            | {"dola": asdict(how) | {"candidates": layers}}
            | _summary(items, scores)
            | {"seconds": time.perf_counter() - begun, "versions": decisive()}
        )
        del found
    return results[-1] if baseline is None else {**results[1], "baseline": results[0]}


def metrics(item: Item, values: dict[str, float]) -> dict[str, float]:
    """MC1, MC2 and MC3 of TruthfulQA (Lin et al. 2021), or the accuracy of FACTOR.

    MC1: the best true statement is above every false one. MC2: the share of probability on true ones. MC3: the share of
    true ones above every false one. Accuracy: the true one is not below any false one; ties count.

    Args:
        item: the statements.
        values: score of each.
    """
    true, false = [values[text] for text in item.true], [values[text] for text in item.false]
    if item.single is None:
        return {"accuracy": float(true[0] >= max(false))}
    best, wrong = item.single
    top = max(*true, *false)
    mass = [math.fsum(math.exp(value - top) for value in side) for side in (true, false)]
    return {
        "mc1": float(values[best] > max(values[text] for text in wrong)),
        "mc2": mass[0] / (mass[0] + mass[1]),
        "mc3": sum(value > max(false) for value in true) / len(true),
    }


def _scores(
    found: Layers, tokenizer: Any, items: Sequence[Item], how: Dola, scoring: Scoring, limit: float,
    progress: Progress, stage: str,
) -> list[dict[str, Score]]:  # fmt: skip
    progress.stage(stage, len(items))
    asked = []
    for number, item in enumerate(items, 1):
        texts = list(
            dict.fromkeys([*item.true, *item.false, *((item.single[0], *item.single[1]) if item.single else ())])
        )
        sequences = [encode(tokenizer, item.prefix, text) for text in texts]
        longest = max(len(ids) for ids, _ in sequences)
        if longest > limit:
            raise CalibrationError(
                f"Item {number} has {longest} tokens, more than the model's {limit} positions. Leave examples out by "
                "--preamble none, stop before it by --limit, or take a model with a longer context."
            )
        asked.append((texts, sequences))
    made = []
    for texts, sequences in asked:
        made.append(dict(zip(texts, score(found, sequences, how, scoring), strict=True)))
        progress.advance()
    return made


def _summary(items: Sequence[Item], scores: Sequence[dict[str, Score]]) -> dict[str, Any]:
    kinds: dict[str, list[dict[str, float]]] = {
        kind: [
            metrics(item, {text: getattr(one, kind) for text, one in own.items()})
            for item, own in zip(items, scores, strict=True)
        ]
        for kind in ("plain", "contrasted")
    }
    names = kinds["plain"][0]
    gains = [
        {name: dola[name] - plain[name] for name in names}
        for plain, dola in zip(kinds["plain"], kinds["contrasted"], strict=True)
    ]
    chosen = Counter(layer for own in scores for one in own.values() for layer in one.layers)
    table = {kind: {name: _mean([row[name] for row in rows]) for name in names} for kind, rows in kinds.items()}
    gain = {name: _mean([row[name] for row in gains]) for name in names}
    return {**table, "gain": gain, "chosen": {str(layer): chosen[layer] for layer in sorted(chosen)}}


def _mean(values: list[float]) -> dict[str, float | None]:
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr": spread}
