"""Stops where quality falls off a cliff, and says so where nobody asked to stop.

A run that makes a smaller model calls `dense_reference` before its work and `check_folder` before it publishes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prunus.data.tokens import folder_positions
from prunus.errors import PrunusError
from prunus.models.checkpoint import Checkpoint
from prunus.models.source import locate
from prunus.text import large

if TYPE_CHECKING:
    from prunus.progress import Progress
    from prunus.recipe import EvaluatePart, Recipe
    from prunus.work import Work

# Nobody wants a model whose perplexity is ten times the dense one's: methods differ by tenths, not by tens.
OBVIOUS = 10.0
# A cliff shows in a few thousand tokens; the full evaluation comes later.
WINDOWS = 4
PROMPT = "Once upon a time, there was"
REFERENCE = "guard.json"
CURE = "Remove less, choose a method or an allocation that keeps more"


class Collapsed(PrunusError):
    """The result is so much worse than the dense model that publishing it was refused."""


def dense_reference(recipe: Recipe, work: Work, progress: Progress, dense: str | None = None) -> None:
    """Measure the dense model before the work, if the recipe sets a limit; kept in the work folder for a resumed run.

    A resumed run may ask another question (`evaluate` is no part of what the weights depend on), or a recovery may have
    another dense model beside it by then: what was measured counts only for the same question about the same files.

    Args:
        recipe: `evaluate.max_ppl_ratio` is the limit.
        work: keeps the numbers.
        progress: told after each window.
        dense: the dense model, where it is not the recipe's own.

    Raises:
        PrunusError: as `evaluate`; so a model or a text that cannot be measured is refused before anything is pruned.
    """
    if recipe.evaluate is None or recipe.evaluate.max_ppl_ratio is None:
        return
    model = dense or recipe.model
    asked = _question(recipe, model)
    if (work.read(REFERENCE) or {}).get("asked") != asked:
        work.write(REFERENCE, {**_measure(recipe, model, progress), "asked": asked})


def check_folder(
    recipe: Recipe, work: Work, folder: Path, progress: Progress, cure: str = CURE
) -> dict[str, Any] | None:
    """Measure a finished checkpoint beside `dense_reference`; None without a limit.

    Args:
        recipe: `evaluate.max_ppl_ratio` is the limit.
        work: holds the dense model's numbers.
        folder: the checkpoint.
        progress: told after each window.
        cure: what a refusal advises.

    Returns:
        perplexity, dense (the dense model's), ratio, limit, windows, length, text, sample and asked (the question and
        the dense model's files).

    Raises:
        Collapsed: the ratio is over the limit; the message has both perplexities and a sample of text.
    """
    dense = work.read(REFERENCE)
    if recipe.evaluate is None or recipe.evaluate.max_ppl_ratio is None or dense is None:
        return None
    found, limit = _measure(recipe, str(folder), progress), recipe.evaluate.max_ppl_ratio
    check_ratio(found, dense, limit, f"Nothing was published; the finished blocks wait in {work.folder}.", cure)
    return _numbers(found, dense, limit, dense["asked"])


def measure_finished(
    recipe: Recipe, folder: Path, known: Mapping[str, Any], dense: str, progress: Progress
) -> dict[str, Any] | None:
    """What `check_folder` returns, for a checkpoint that was published before the limit was set; None without a limit.

    The caller holds it against the limit: `check_ratio(found, {"perplexity": found["dense"]}, ...)`.

    Args:
        recipe: `evaluate.max_ppl_ratio` is the limit.
        folder: the checkpoint.
        known: what was measured of it earlier, or nothing; it counts if the question and the dense model are the same.
        dense: the dense model.
        progress: told after each window.

    Raises:
        PrunusError: as `evaluate`.
    """
    if recipe.evaluate is None or recipe.evaluate.max_ppl_ratio is None:
        return None
    asked, limit = _question(recipe, dense), recipe.evaluate.max_ppl_ratio
    if known.get("asked") == asked:
        return {**known, "limit": limit}
    whole = _measure(recipe, dense, progress)
    return _numbers(_measure(recipe, str(folder), progress), whole, limit, asked)


def _numbers(
    found: Mapping[str, Any], dense: Mapping[str, Any], limit: float, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """What is recorded about a checkpoint beside its dense model."""
    keys = ("windows", "length", "text", "sample")
    numbers = {"perplexity": found["perplexity"], "dense": dense["perplexity"], "limit": limit}
    ratio = found["perplexity"] / dense["perplexity"]
    return {**numbers, "ratio": ratio, **{key: found[key] for key in keys}, "asked": dict(asked)}


def check_ratio(
    result: Mapping[str, Any], dense: Mapping[str, Any], limit: float | None, consequence: str, cure: str = CURE
) -> str | None:
    """Compare two results of `evaluate`, of the pruned and of the dense model.

    Args:
        result: has perplexity and, if asked, sample.
        dense: the dense model's.
        limit: largest ratio of perplexities that is accepted, or None.
        consequence: a sentence for the refusal: what was not done, and where things are.
        cure: what a refusal advises.

    Returns:
        A warning for an obvious collapse under no limit; else None.

    Raises:
        Collapsed: the ratio is over the limit.
    """
    ratio = result["perplexity"] / dense["perplexity"]
    if ratio <= (OBVIOUS if limit is None else limit):
        return None
    found, whole = (large(one["perplexity"]) for one in (result, dense))
    facts = f"perplexity {found}, {large(ratio)} times the dense model's {whole}"
    if limit is None:
        return f"The model has collapsed: {facts}. Remove less, or choose a method or an allocation that keeps more."
    spoken = f" It writes: “{result['sample']}”" if result.get("sample") else ""
    raise Collapsed(
        f"Quality fell off a cliff: {facts}, and at most {limit:g} times was allowed.{spoken} {consequence} {cure}, "
        "or raise --max-ppl-ratio."
    )


def probe_warning(logits: Tensor, ids: Tensor | None) -> str | None:
    """A warning if a model predicts the probe's tokens worse than by guessing all tokens alike; costs nothing.

    Args:
        logits: [1, positions, vocabulary], of the pruned model.
        ids: int64 [1, positions], what it read; None for inputs that are no tokens.
    """
    if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2:
        return None
    if int(ids.max()) >= logits.shape[2]:
        return None  # no language head: these are hidden states
    loss = float(nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
    uniform = math.log(logits.shape[2])
    if loss <= uniform:
        return None
    return (
        f"On {ids.shape[1] - 1} tokens of the calibration text the pruned model predicts worse than guessing every "
        f"token alike ({loss:.1f} nats a token; guessing: {uniform:.1f}): it has most likely collapsed. Evaluate it "
        "before you use it; --max-ppl-ratio would stop such a run."
    )


def _measure(recipe: Recipe, model: str, progress: Progress) -> dict[str, Any]:
    """Perplexity on a few windows and a sentence, by the recipe's `evaluate`."""
    from prunus.evaluation.perplexity import evaluate

    return evaluate(model, **_asked(recipe, model), progress=progress)


def _asked(recipe: Recipe, model: str) -> dict[str, Any]:
    """The arguments of `evaluate`, JSON values all of them."""
    part: EvaluatePart | None = recipe.evaluate
    assert part is not None, "there is no limit without `evaluate`"
    positions = folder_positions(_folder(recipe, model))
    return {
        "text": "wikitext2" if part.text == "none" else part.text,
        "length": min(part.length, positions or part.length),
        "windows": min(WINDOWS, part.windows or WINDOWS),
        "bos": part.bos,
        "sample": part.sample or PROMPT,
        "device": recipe.device,
        "dtype": recipe.dtype,
        "trust_remote_code": recipe.trust_remote_code,
    }


def _question(recipe: Recipe, model: str) -> dict[str, Any]:
    """What the dense model is asked, and its files."""
    return {**_asked(recipe, model), "files": Checkpoint.open(_folder(recipe, model)).identity}


def _folder(recipe: Recipe, model: str) -> Path:
    return locate(model, trust_remote_code=recipe.trust_remote_code)
