"""One model after the other asked the same questions, and one set beside the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunus.data.reading import Reading
from prunus.data.tokens import load_tokenizer
from prunus.errors import ModelError
from prunus.evaluation.loading import ENGINES
from prunus.evaluation.measure import measure
from prunus.evaluation.sample import sample as continue_prompt
from prunus.evaluation.tasks import Scores, Suite, score, summary
from prunus.evaluation.windows import Windows
from prunus.progress import Progress
from prunus.versions import decisive


@dataclass(frozen=True)
class Questions:
    """What every model is asked.

    Attributes:
        reading: the text, or None for no perplexity.
        chosen: numbers of its windows.
        suite: tasks, or None.
        sample: a prompt to continue, or None.
        device: where to compute.
        dtype: to compute in, or "auto".
        trust_remote_code: run code from the models' folders.
    """

    reading: Reading | None
    chosen: Sequence[int]
    suite: Suite | None
    sample: str | None
    device: str
    dtype: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Judged:
    """The answers of one model.

    Attributes:
        result: what `evaluate` returns for it, but for tasks.
        scores: of each task, with the single items; empty without tasks.
    """

    result: dict[str, Any]
    scores: Mapping[str, Scores] = field(default_factory=dict)


def judge(
    name: str,
    folder: Path,
    plan: Windows | None,
    questions: Questions,
    *,
    progress: Progress,
    engine: str = "transformers",
    gate: Callable[[Mapping[str, Any]], None] | None = None,
) -> Judged:
    """Load a model and ask it everything: perplexity, then a sentence, then the tasks, which take longest.

    Args:
        name: as the user calls the model.
        folder: where it lies.
        plan: its windows of the text, or None.
        questions: what to ask.
        progress: told after each step.
        engine: what computes it, a key of `ENGINES`.
        gate: called with the result before the tasks; it may raise to save their time.

    Raises:
        ModelError: the model cannot be loaded or gives numbers that are not finite.
    """
    loaded = ENGINES[engine](
        folder, device=questions.device, dtype=questions.dtype, trust_remote_code=questions.trust_remote_code
    )
    note = Path(name).name
    result: dict[str, Any] = {"model": name, "engine": engine}
    if plan is not None and questions.reading is not None:
        result |= measure(loaded, plan, questions.chosen, note=note, progress=progress)
        result |= {"text": questions.reading.source, "text_sha256": questions.reading.sha256}
    else:
        result |= {"dtype": str(loaded.dtype).removeprefix("torch."), "device": str(loaded.device)}
    result["versions"] = decisive()
    if questions.sample is not None:
        result["sample"] = continue_prompt(loaded, load_tokenizer(folder), prompt=questions.sample)
    if gate is not None:
        gate(result)
    if questions.suite is None:
        return Judged(result)
    return Judged(result, score(questions.suite, loaded, load_tokenizer(folder), note=note, progress=progress))


def beside(judged: Judged, dense: Judged | None, questions: Questions) -> dict[str, Any]:
    """The result of one model, with the dense one's under `baseline` and what sets them apart."""
    result = dict(judged.result)
    if questions.suite is not None:
        scores = None if dense is None else dense.scores
        result |= {**summary(questions.suite, judged.scores, scores), **asked(questions.suite)}
    if dense is None:
        return result
    below = dict(dense.result)
    if questions.suite is not None:
        below |= summary(questions.suite, dense.scores)
    result["baseline"] = below
    if "perplexity" in result:
        result["ratio"] = result["perplexity"] / below["perplexity"]
    return result


def asked(suite: Suite) -> dict[str, Any]:
    """What the tasks' numbers depend on besides the model."""
    from importlib.metadata import version

    files = {name: {"file": str(rows.path), "sha256": rows.sha256} for name, rows in suite.files.items()}
    return {"asked": {"limit": suite.limit, "batch": suite.batch, "lm_eval": version("lm_eval"), "files": files}}


def check_same(plans: Sequence[Windows | None], names: Sequence[str]) -> None:
    """Refuse models that cut the text differently: perplexities a token of two vocabularies cannot be compared.

    Raises:
        ModelError: naming the models.
    """
    cuts = [plan for plan in plans if plan is not None]
    if any(not plan.ids.equal(cuts[0].ids) or plan.head != cuts[0].head for plan in cuts):
        raise ModelError(
            f"{names[-1]} and {names[0]} make different tokens of the text; evaluate each alone, without baseline."
        )
