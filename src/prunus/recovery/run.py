"""The job: recover a pruned folder into a new one, with the same zeros, proven from the files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from prunus import memory
from prunus.distributed import Processes
from prunus.errors import FormatError
from prunus.evaluation import guard
from prunus.models.checkpoint import Checkpoint
from prunus.models.source import dense_name
from prunus.progress import Progress
from prunus.recipe import Recipe
from prunus.recovery import masks as registry
from prunus.recovery.card import recovery_card
from prunus.recovery.job import RecoveryJob, prepare
from prunus.recovery.masks import violations
from prunus.recovery.recovery import Outcome, Recovery
from prunus.running import Clock, carry_out
from prunus.verify import verify

# What a refusal for quality advises.
CURE = "Train longer (--minutes), try another method, remove less before"


def recover(
    recipe: Recipe,
    out: Path,
    *,
    recovery: Recovery | None = None,
    restart: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Recover a pruned model into a folder; an interrupted call, made again, continues where it stopped.

    Args:
        recipe: its `model` is the pruned folder, its `recover` part says how.
        out: the folder to make.
        recovery: instead of the one that the recipe names.
        restart: forget unfinished work of an earlier call.
        overwrite: replace `out` if it exists; it stays untouched until the new one is whole.
        progress: told about every step.

    Returns:
        What was done and measured; JSON values.

    Raises:
        PrunusError: the recipe, the model, the text or the place to write to do not do, or the training failed.
    """

    def checked(processes: Processes, warnings: list[str]) -> RecoveryJob:
        return prepare(
            recipe, Path(out).resolve(), recovery=recovery, overwrite=overwrite, processes=processes, warnings=warnings
        )

    return carry_out(checked, _run, device=recipe.device, restart=restart, progress=progress)


def _run(job: RecoveryJob, progress: Progress, clock: Clock) -> dict[str, Any]:
    """Everything after the checks."""
    limited = job.recipe.evaluate is not None and job.recipe.evaluate.max_ppl_ratio is not None
    dense = str(job.dense_folder()) if limited else None
    job.processes.on_first(lambda: guard.dense_reference(job.recipe, job.work, progress, dense))
    with clock("recover"):
        outcome = job.recovery.recover(job, progress)
    return job.processes.on_first(lambda: _publish(job, outcome, progress, clock))


def _publish(job: RecoveryJob, outcome: Outcome, progress: Progress, clock: Clock) -> dict[str, Any]:
    """Prove the zeros from the files, reload them in a fresh process, describe, and let OUT appear."""
    folder, loads = job.work.checkpoint, job.output.loads
    with clock("finish"):
        zeros = check_zeros(job)
        if job.masks.removed:
            job.masks.write(folder / registry.FILE)
        # Whoever loads the folder before it is described must know that its shapes are its own.
        job.work.write("checkpoint/prunus.json", {"result": {"loads": loads}})
    progress.stage("verify", 1)
    with clock("verify"):
        inputs = {f"input.{name}": value.contiguous() for name, value in job.probe.inputs.items()}
        job.work.write_tensors("probe.safetensors", {**inputs, "logits": outcome.logits.contiguous()})
        checked = verify(
            folder,
            job.work.folder / "probe.safetensors",
            job.dtype_name,
            str(job.device),
            job.recipe.trust_remote_code or loads == "code",
            loads == "prunus",
        )
    progress.advance("reloaded in a fresh process")
    if warning := collapse(outcome.after, job.model.config.get_text_config().vocab_size):
        job.warnings.append(warning)
    result = _result(job, outcome, zeros, clock) | {"verify": checked, "loads": loads}
    result["guard"] = guard.check_folder(job.recipe, job.work, folder, progress, CURE)
    result["seconds"] = clock.read()
    record = {
        "format": 1, "recipe": job.recipe.resolved(), "fingerprint": job.fingerprint, "result": result,
        "pruned": job.record,
    }  # fmt: skip
    job.work.write("checkpoint/prunus.json", record)
    (folder / "README.md").write_text(recovery_card(result, job.record), encoding="utf-8")
    job.work.publish(job.overwrite)
    return result


def collapse(loss: float, vocabulary: int) -> str | None:
    """A warning if a model predicts the held-out text worse than by guessing all tokens alike; costs nothing.

    Args:
        loss: held-out, nats a token.
        vocabulary: number of tokens.
    """
    guessing = math.log(vocabulary)
    if loss <= guessing:
        return None
    return (
        f"The recovered model predicts the held-out text worse than guessing every token alike ({loss:.1f} nats a "
        f"token; guessing: {guessing:.1f}): it is still collapsed. --max-ppl-ratio would refuse such a result."
    )


def check_zeros(job: RecoveryJob) -> dict[str, Any]:
    """Read every block that was written, and count the zeros where the masks say that nothing is kept.

    Returns:
        `before` and `after`: removed weights, and those of them that are +0.0 to the bit; `patterns`: how many
        matrices follow which N:M.

    Raises:
        FormatError: a removed weight is not +0.0, or an N:M group keeps more than N. That is a fault of the method.
    """
    weights, before, after = job.stream.weights, 0, 0
    patterns: dict[str, int] = {}
    for block in job.blocks:
        weights.load(weights.sources(block.name), job.output.shard(block))
        for matrix in block.matrices():
            removed, zero = violations(matrix, job.masks)
            before, after = before + removed, after + zero
            if removed == 0:
                continue
            wanted = job.masks.pattern(matrix.name)
            if wanted and not _holds(matrix.weight, wanted):
                raise FormatError(f"{matrix.name} is no longer {wanted} after the recovery; nothing was published.")
            patterns[wanted or "unstructured"] = patterns.get(wanted or "unstructured", 0) + 1
        weights.drop(block.module)
    if before != after:
        raise FormatError(f"{before - after:,} of {before:,} zeros were lost by the recovery; nothing was published.")
    return {"before": before, "after": after, "patterns": patterns}


def _holds(weight: torch.Tensor, pattern: str) -> bool:
    """Whether every group of M consecutive inputs has at most N weights that are not zero."""
    kept, group = map(int, pattern.split(":"))
    return int((weight != 0).unflatten(1, (-1, group)).sum(-1).max()) <= kept


def _result(job: RecoveryJob, outcome: Outcome, zeros: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """The object that `--json` prints, but for what verifying adds."""
    weights = max(sum(map(job.masks.size, job.masks.packed)), 1)
    return {
        "model": job.recipe.model,
        "dense": job.part.dense or dense_name(job.record),
        "out": str(job.out),
        "method": job.part.method,
        "objective": job.part.objective,
        "trainable": outcome.trainable,
        "trainable_share": outcome.trainable / job.parameters,
        "loss": {"before": outcome.before, "after": outcome.after},
        "zeros": zeros,
        "sparsity": zeros["after"] / weights,
        "matrix_weights": weights,
        "masks": "derived from the zeros" if job.masks.derived else "registry",
        "text": job.lessons.summary,
        "training": outcome.facts,
        "parameters": job.parameters,
        "seconds": clock.read(),
        "peak_rss_bytes": memory.peak(),
        "size": {"out_bytes": Checkpoint.open(job.work.checkpoint).bytes},
        "architecture": type(job.model).__name__,
        "device": str(job.device),
        "dtype": job.dtype_name,
        "threads": torch.get_num_threads(),
        "processes": job.processes.world,
        "versions": job.versions,
        "warnings": list(job.warnings),
    }
