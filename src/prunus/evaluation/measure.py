"""The numbers of one model in memory on the windows of a text."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunus.data.tokens import check_vocabulary
from prunus.errors import ModelError
from prunus.evaluation.losses import plan_pieces, token_losses
from prunus.evaluation.windows import Windows
from prunus.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
