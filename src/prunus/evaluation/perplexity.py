"""Perplexity by the protocol of the pruning papers, with everything that a number needs beside it to be compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.data.reading import read
from prunus.data.tokens import check_bos, check_vocabulary, load_tokenizer
from prunus.errors import ModelError, RecipeError, near
from prunus.evaluation.loading import check_device, check_dtype, load_model
from prunus.evaluation.losses import plan_pieces, token_losses
from prunus.evaluation.sample import sample as continue_prompt
from prunus.evaluation.windows import Windows, check_numbers, choose, cut
from prunus.models.source import locate
from prunus.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        baseline: the dense model; measured first, by the same code on the same windows.
        text: "wikitext2" (the whole test split), a file or a data set; token ids [rows, tokens] as `.npy` are cut
            within each row.
        length: tokens in a window; part of the result.
        windows: the first so many; None: all.
        indices: these windows instead, by number.
        bos: "auto", "always" or "never".
        device: such as cpu or cuda:0.
        dtype: "auto" (float32 on a CPU, else the checkpoint's own), float32, bfloat16 or float16.
        sample: a prompt; each model's greedy sentence is added under `sample`.
        trust_remote_code: as in `locate`.
        engine: what computes `model`: transformers, or packed, which packs an ordinary folder without loss first. The
            baseline is always computed by transformers.
        progress: told after each window.

    Returns:
        A JSON object: model, engine, perplexity, loss (nats a token), loss_stderr (standard error of the mean over
        windows; None for one), windows, length, predictions, tokens (in the windows), text_tokens (in the whole text),
        text, text_sha256, bos, dtype, device, seconds (of the windows alone), versions and, where asked, sample,
        baseline (the same keys) and ratio (perplexity over the baseline's).

    Raises:
        RecipeError: a number out of range, windows longer than the model's positions, unusable device or dtype.
        CalibrationError: the text is missing, damaged or too short, or there is no tokenizer.
        ModelError: a model cannot be loaded, gives numbers that are not finite, or cuts the text differently than the
            baseline does (perplexities a token of two vocabularies cannot be compared; evaluate each alone).
    """
    check_numbers(length, windows, indices)
    check_bos(bos)
    if engine not in LOADERS:
        raise RecipeError(f"There is no engine {engine!r} to evaluate with.{near(engine, LOADERS)}")
    check_dtype(dtype, check_device(device))
    reading = read(text, purpose="evaluation")
    names = [str(model)] if baseline is None else [str(baseline), str(model)]
    folders = [locate(name, trust_remote_code=trust_remote_code) for name in names]
    # All that can be refused is refused before the first model is loaded.
    plans = [cut(reading, folder, length, bos) for folder in folders]
    if any(not plan.ids.equal(plans[0].ids) or plan.head != plans[0].head for plan in plans):
        raise ModelError(
            f"{model} and {baseline} make different tokens of the text; evaluate each alone, without baseline."
        )
    chosen = choose(len(plans[0].ids), windows, indices, reading.source)
    results = []
    for name, folder, plan in zip(names, folders, plans, strict=True):
        own = engine if folder is folders[-1] else "transformers"
        how = {"device": device, "dtype": dtype}
        loaded = LOADERS[own](folder, trust_remote_code=trust_remote_code, **how)
        numbers = measure(loaded, plan, chosen, note=Path(name).name, progress=progress or Silent())
        result = {"model": name, "engine": own, **numbers}
        result |= {"text": reading.source, "text_sha256": reading.sha256, "versions": versions()}
        if sample is not None:
            result["sample"] = continue_prompt(loaded, load_tokenizer(folder), prompt=sample)
        results.append(result)
        del loaded
    if baseline is None:
        return results[0]
    return {**results[1], "baseline": results[0], "ratio": results[1]["perplexity"] / results[0]["perplexity"]}


def _load_packed(folder: Path, *, device: str, dtype: str, trust_remote_code: bool) -> Any:
    from prunus.packed.running import open_model

    if device != "cpu" or dtype not in ("auto", "float32"):
        raise RecipeError(f"The packed engine runs on the CPU in float32, not on {device} in {dtype}; leave both out.")
    return open_model(folder)


# What computes a model -> how it is loaded.
LOADERS: dict[str, Callable[..., Any]] = {"transformers": load_model, "packed": _load_packed}


def measure(
    model: PreTrainedModel, plan: Windows, chosen: Sequence[int], *, note: str = "", progress: Progress
) -> dict[str, Any]:
    """The numbers of `evaluate` for a model in memory.

    Args:
        model: in evaluation mode, on its device.
        plan: all windows of the text.
        chosen: numbers of the windows to measure.
        note: what the progress line calls it.
        progress: told after each window.

    Raises:
        ModelError: if a loss is not finite; the window is named.
        CalibrationError: if an id is beyond the vocabulary.
    """
    check_vocabulary(plan.ids.numpy(), model.config.get_text_config().vocab_size, plan.source)
    progress.stage(f"evaluate {note}", len(chosen))
    start = time.perf_counter()
    means, predictions = [], 0
    pieces = plan_pieces(model, plan.pair(chosen[0])[0].to(model.device))
    for index in chosen:
        inputs, targets = (ids.to(model.device) for ids in plan.pair(index))
        # float64: the mean over a window must not add an error to losses that are good to seven digits.
        means.append(float(token_losses(model, inputs, targets, pieces=pieces).double().mean()))
        if not math.isfinite(means[-1]):
            raise ModelError(
                f"The model gives no finite loss in window {index} ({means[-1]}); its weights or dtype are broken."
            )
        predictions += len(targets)
        progress.advance(f"window {index}")
    return {
        **summary(means),
        "windows": len(chosen),
        "length": plan.ids.shape[1],
        "predictions": predictions,
        "tokens": len(chosen) * plan.ids.shape[1],
        "text_tokens": plan.text_tokens,
        "bos": plan.head is not None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "seconds": time.perf_counter() - start,
    }


def summary(means: Sequence[float]) -> dict[str, float | None]:
    """Perplexity of the windows' mean losses, and the standard error of their mean (None for one window).

    A loss over 709 nats has no float64 exponential: the perplexity is then infinite and written as 1e308.
    """
    loss = statistics.fmean(means)
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return {"perplexity": math.exp(loss) if loss < 709 else 1e308, "loss": loss, "loss_stderr": error}


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers hang on."""
    import prunus

    return {"prunus": prunus.__version__, "torch": version("torch"), "transformers": version("transformers")}
