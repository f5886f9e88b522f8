"""Perplexity by the protocol of the pruning papers, with everything that a number needs beside it to be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunus.data.reading import read
from prunus.data.tokens import check_bos
from prunus.errors import PrunusError, RecipeError, near
from prunus.evaluation.guard import check_ratio
from prunus.evaluation.judging import Questions, beside, check_same, judge
from prunus.evaluation.loading import ENGINES, check_device, check_dtype
from prunus.evaluation.measure import measure, summary
from prunus.evaluation.tasks import prepare
from prunus.evaluation.windows import check_numbers, choose, cut
from prunus.models.source import dense_name, locate
from prunus.progress import Progress, Silent

__all__ = ["NO_TEXT", "evaluate", "known_dense", "measure", "summary"]

NO_TEXT = "none"  # as a text: no perplexity; as a baseline: none


def evaluate(  # noqa: PLR0913 - one argument for each thing that is part of the result
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    text: str | Path = "wikitext2",
    length: int = 1024,
    windows: int | None = None,
    indices: Sequence[int] | None = None,
    bos: str = "auto",
    device: str = "cpu",
    dtype: str = "auto",
    sample: str | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch: int = 1,
    trust_remote_code: bool = False,
    engine: str = "transformers",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """exp(mean over windows of the window's mean negative log-likelihood) (SparseGPT, Wanda and everyone after).

    The text is tokenised once, without special tokens, and cut into windows of `length` tokens that do not overlap;
    the tail is dropped; each window is seen alone. Without a BOS a window gives `length` - 1 predictions. With one
    (`data.tokens.head_token`) the model reads BOS and the first `length` - 1 tokens and predicts all `length` tokens of
    the window: the windows stay the same, and no more than `length` positions are ever used.

    Args:
        model: folder, `.gguf`, alias or hub id.
        baseline: the dense model; measured first, by the same code on the same windows. With `tasks` it is the model
            that MODEL's prunus.json names, unless it is given here or is "none".
        text: "wikitext2" (the whole test split), a file or a data set; token ids [rows, tokens] as `.npy` are cut
            within each row. "none": no perplexity, only `tasks`.
        length: tokens in a window; part of the result.
        windows: the first so many; None: all.
        indices: these windows instead, by number.
        bos: "auto", "always" or "never".
        device: such as cpu or cuda:0.
        dtype: "auto" (float32 on a CPU, else the checkpoint's own), float32, bfloat16 or float16.
        sample: a prompt; each model's greedy sentence is added under `sample`.
        tasks: names of lm-eval's tasks, or of `tasks.GROUPS`.
        task_data: folder of their items; None: the hub's data sets.
        limit: only the first so many items of each task.
        batch: requests of tasks in one forward pass.
        trust_remote_code: as in `locate`.
        engine: what computes `model`: transformers, or packed, which packs an ordinary folder without loss first. The
            baseline is always computed by transformers.
        progress: told after each window.

    Returns:
        A JSON object: model, engine, perplexity, loss (nats a token), loss_stderr (standard error of the mean over
        windows; None for one), windows, length, predictions, tokens (in the windows), text_tokens (in the whole text),
        text, text_sha256, bos, dtype, device, seconds (of the windows alone), versions and, where asked, sample,
        baseline (the same keys) and ratio (perplexity over the baseline's); with tasks, tasks and groups
        (`tasks.summary`) and asked (what they depend on); notes, only where there is something to say.

    Raises:
        RecipeError: a number out of range, windows longer than the model's positions, unusable device or dtype.
        CalibrationError: the text is missing, damaged or too short, or there is no tokenizer.
        ModelError: a model cannot be loaded, gives numbers that are not finite, or cuts the text differently than the
            baseline does (perplexities a token of two vocabularies cannot be compared; evaluate each alone).
    """
    check_numbers(length, windows, indices)
    check_bos(bos)
    if engine not in ENGINES:
        raise RecipeError(f"There is no engine {engine!r} to evaluate with.{near(engine, ENGINES)}")
    check_dtype(dtype, check_device(device))
    if text == NO_TEXT and not tasks:
        raise RecipeError("With the text 'none' there is nothing to measure; name tasks, or a text.")
    reading = None if text == NO_TEXT else read(text, purpose="evaluation")
    notes: list[str] = []
    idle = [name for name, value in (("limit", limit), ("task_data", task_data)) if value is not None and not tasks]
    if idle:
        raise RecipeError(f"{idle[0]} is about benchmark tasks and there are none; name tasks, or leave it out.")
    if baseline is None and tasks:
        baseline = known_dense(model, notes, trust_remote_code)
    baseline = None if baseline == NO_TEXT else baseline
    names = [str(model)] if baseline is None else [str(baseline), str(model)]
    folders = [locate(name, trust_remote_code=trust_remote_code) for name in names]
    # All that can be refused is refused before the first model is loaded.
    plans = [None if reading is None else cut(reading, folder, length, bos) for folder in folders]
    check_same(plans, names)
    chosen = [] if plans[0] is None else choose(len(plans[0].ids), windows, indices, plans[0].source)
    suite = prepare(tasks, data=task_data, limit=limit, batch=batch) if tasks else None
    questions = Questions(reading, chosen, suite, sample, device, dtype, trust_remote_code)
    judged = [
        judge(
            name,
            folder,
            plan,
            questions,
            progress=progress or Silent(),
            engine=engine if folder is folders[-1] else "transformers",
        )
        for name, folder, plan in zip(names, folders, plans, strict=True)
    ]
    result = beside(judged[-1], judged[0] if baseline is not None else None, questions)
    if "ratio" in result and (warning := check_ratio(result, result["baseline"], None, "")):
        notes.append(warning)
    return {**result, "notes": notes} if notes else result


def known_dense(model: str | Path, notes: list[str], trust_remote_code: bool = False) -> str | None:
    """The dense model that a pruned folder's `prunus.json` names, if it can be had; else a note says why not."""
    try:
        record = json.loads((Path(model).expanduser() / "prunus.json").read_text("utf-8"))
        dense = dense_name(record)
        if dense is None:
            raise KeyError("model")
        locate(dense, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError):
        notes.append("The dense model is not known, so nothing stands beside the scores; name it with --baseline.")
        return None
    except PrunusError as problem:
        notes.append(f"The dense model cannot be had, so nothing stands beside the scores ({problem})")
        return None
    return dense
