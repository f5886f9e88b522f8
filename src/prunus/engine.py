"""The main job: measure → allocate → prune, block by block, into a checkpoint that stock tools load."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunus import memory, speedup
from prunus.data.tokens import folder_positions
from prunus.distributed import Processes
from prunus.edits import apply
from prunus.evaluation import guard
from prunus.evidence import Evidence, of_inputs
from prunus.job import Job, prepare
from prunus.methods.elementwise import Elementwise
from prunus.methods.shape import Shape
from prunus.models.checkpoint import Checkpoint
from prunus.models.modelling import ours
from prunus.output import Output
from prunus.progress import Progress
from prunus.recipe import Recipe
from prunus.running import Clock, carry_out
from prunus.shaping import cut, decide, shapes
from prunus.sites import Block
from prunus.statistics import SiteStats
from prunus.stream import Step
from prunus.survey import Survey
from prunus.verify import verify


def prune(
    recipe: Recipe, out: Path, *, restart: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Prune a model into a folder; an interrupted call, made again, continues where it stopped.

    Args:
        recipe: what to prune and how.
        out: the folder to make.
        restart: forget unfinished work of an earlier call.
        overwrite: replace `out` if it exists; it stays untouched until the new one is whole.
        progress: told about every block.

    Returns:
        What was done and measured; JSON values (see `docs/formats.md`).

    Raises:
        PrunusError: the recipe, the model, the text or the place to write to do not do; nothing was changed then.
    """

    def checked(processes: Processes, warnings: list[str]) -> Job:
        return prepare(recipe, Path(out).resolve(), overwrite=overwrite, processes=processes, warnings=warnings)

    return carry_out(checked, _run, device=recipe.device, restart=restart, progress=progress)


def _run(job: Job, progress: Progress, clock: Clock) -> dict[str, Any]:
    """Everything after the checks."""
    job.processes.on_first(lambda: guard.dense_reference(job.recipe, job.work, progress))
    if job.recipe.prune.speedup is not None:
        with clock("speedup"):
            speedup.resolve(job, progress)
    output = Output(job)
    evidence = Evidence(job.stream, job.batches, job.work, progress, job.needs)
    if evidence.kinds:
        with clock("gradients"):
            evidence.prepare()
    reports = (
        _reshape(job, job.method, output, evidence, progress, clock)
        if isinstance(job.method, Shape)
        else (_mask(job, output, evidence, progress, clock))
    )
    with clock("finish"):
        job.processes.on_first(output.outside)
        logits = job.stream.logits(job.probe.inputs)
    return job.processes.on_first(lambda: _publish(job, output, logits, _result(job, reports, clock), progress, clock))


def _mask(job: Job, output: Output, evidence: Evidence, progress: Progress, clock: Clock) -> list[dict[str, Any]]:
    """Zero weights inside matrices; returns the reports of all blocks."""
    with clock("survey"):
        budget = _budget(job, evidence, progress)
    with clock("prune"):
        return _blocks(job, output, budget, evidence, progress)


def _reshape(
    job: Job, method: Shape, output: Output, evidence: Evidence, progress: Progress, clock: Clock
) -> list[dict[str, Any]]:
    """Make shapes smaller; returns the reports of all blocks."""
    with clock("survey"):
        plan = decide(job, method, output, evidence, progress)
    with clock("prune"):
        return cut(job, method, output, plan, evidence, progress)


def _publish(
    job: Job, output: Output, logits: torch.Tensor, result: dict[str, Any], progress: Progress, clock: Clock
) -> dict[str, Any]:
    """Reload what was written in a fresh process, complete the result, and let OUT appear."""
    progress.stage("verify", 1)
    with clock("verify"):
        probe = output.probe(job.probe.inputs, logits)
        result["verify"] = verify(
            job.work.checkpoint,
            probe,
            job.dtype_name,
            str(job.device),
            job.recipe.trust_remote_code or ours(job.work.checkpoint),
            output.loads == "prunus",
        )
        if isinstance(job.method, Shape):
            result |= {"loads": output.loads, "shapes": {**result["shapes"], "parameters": output.parameters()}}
        elif output.loads != "transformers":
            result["loads"] = output.loads
    progress.advance("reloaded in a fresh process")
    if warning := guard.probe_warning(logits, job.probe.inputs.get("input_ids")):
        result["warnings"].append(warning)
    if job.recipe.prune.speedup is not None:
        with clock("speedup"):
            result["speedup"] = speedup.measured(job, progress)
        result["warnings"] += speedup.shortfall(result["speedup"])
    result["guard"] = guard.check_folder(job.recipe, job.work, job.work.checkpoint, progress)
    result["seconds"] = clock.read()
    result["peak_rss_bytes"] = memory.peak()
    output.describe(result)
    job.work.publish(job.overwrite)
    return result


def _budget(job: Job, evidence: Evidence, progress: Progress) -> dict[str, float]:
    """The sparsity of every site, from the allocation, rounded to what the pattern can express."""
    divided = job.processes.agree(job.work.read("budget.json"))
    survey = Survey(job.stream, job.batches, job.work, progress, evidence)
    if divided is None:
        divided = job.allocation.divide(survey, job.sparsity)
        job.processes.on_first(partial(job.work.write, "budget.json", divided))
    # Also for a budget of an earlier call: what rounding has to say about it belongs to the result of this one.
    assert isinstance(job.method, Elementwise)
    return job.method.pattern.settle(divided, {info.name: info.size for info in survey.sites}, job.sparsity)


def _blocks(
    job: Job, output: Output, budget: Mapping[str, float], evidence: Evidence, progress: Progress
) -> list[dict[str, Any]]:
    """Prune every block that is not finished; returns the reports of all."""
    reports = {block.name: job.processes.agree(output.report(block)) for block in job.stream.blocks}

    def finished(block: Block) -> Checkpoint | None:
        return output.shard(block) if reports[block.name] else None

    progress.stage("prune", len(job.stream.blocks))
    job.resumed = sum(report is not None for report in reports.values())
    for _ in range(job.resumed):
        progress.advance("finished before")
    # Gradients of the loss are there already; what the text is still needed for is seen while the block runs.
    text = job.method.needs - evidence.kinds
    for step in job.stream.walk(job.batches if text else job.batches[-1:], of_inputs(job.method.needs), finished):
        begun = time.monotonic()
        report, orders = _block(job, step, evidence.of(step, job.method.needs), budget)
        report["seconds"] = time.monotonic() - begun
        job.processes.on_first(partial(output.block, step.block, report, orders=orders))
        reports[step.block.name] = report
        progress.advance(step.block.name, error=report["error"])
    return [report for block in job.stream.blocks if (report := reports[block.name])]


def _block(
    job: Job, step: Step, known: Mapping[str, SiteStats], budget: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Prune the matrices of one block and run it again; returns its report, and orders of columns by parameter."""
    matrices, idle, orders = [], [], {}
    for slot, matrix in zip(step.block.slots, step.block.matrices(), strict=True):
        assert isinstance(job.method, Elementwise)
        stats = known[matrix.name]
        if stats.unseen and slot.expert is None:
            idle.append(matrix.name)  # never called with the text: nothing is known about it
            continue
        edit = job.method.prune(matrix, stats, budget[matrix.name])
        apply(step.block, edit, job.stream.weights.dtype)
        if edit.order is not None and slot.expert is None and not slot.transposed:
            orders[slot.parameter] = edit.order
        zeros = matrix.weight.numel() - int(matrix.weight.count_nonzero())
        size = matrix.weight.numel()
        matrices.append({
            "name": matrix.name, "shape": list(slot.info.shape), "wanted": budget[matrix.name],
            "sparsity": zeros / size, "zeros": zeros, "unseen": stats.unseen,
        })  # fmt: skip
    size = sum(info.size for info in step.block.infos)
    report = {
        "name": step.block.name,
        "sparsity": sum(matrix["zeros"] for matrix in matrices) / size if size else 0.0,
        "wanted": sum(budget[info.name] * info.size for info in step.block.infos) / size if size else 0.0,
        "error": step.propagate(),
        "matrices": matrices,
        "idle": idle,
    }
    return report, orders


def _result(job: Job, reports: list[dict[str, Any]], clock: Clock) -> dict[str, Any]:
    """The object that `--json` prints, but for what verifying adds."""
    matrices = [matrix for report in reports for matrix in report["matrices"]]
    size = sum(matrix["shape"][0] * matrix["shape"][1] for matrix in matrices)
    zeros = sum(matrix["zeros"] for matrix in matrices)
    idle = [name for report in reports for name in report["idle"]]
    if idle:
        job.warnings.append(
            f"{len(idle)} matrices were never called with the calibration text and stay dense, such as {idle[0]}."
        )
    unseen = sum(matrix["unseen"] for matrix in matrices)
    if unseen and job.method.needs:
        job.warnings.append(
            f"{unseen} of {len(matrices)} matrices saw no calibration token (rarely used experts); they were ranked by "
            "magnitude. More --samples would reach them."
        )
    walked = {report["name"] for report in reports}
    for tower in sorted({block.tower for block in job.stream.blocks if block.name not in walked}):
        job.warnings.append(f"{tower} did not run on the calibration inputs and stays dense.")
    part = job.recipe.prune
    dense = job.checkpoint.bytes
    written = Checkpoint.open(job.work.checkpoint).bytes
    return {
        "model": job.recipe.model,
        "out": str(job.out),
        "method": part.method,
        "metric": part.metric,
        "update": part.update,
        "pattern": part.pattern,
        "allocation": part.allocation,
        "sparsity": {"wanted": job.sparsity, "reached": zeros / size, "model": zeros / job.parameters},
        "blocks": reports,
        "resumed_blocks": job.resumed,
        "sites": len(matrices),
        "parameters": {"model": job.parameters, "sites": size, "zeros": zeros},
        "calibration": job.calibration_summary,
        "seconds": clock.read(),
        "peak_rss_bytes": memory.peak(),
        "predicted_peak_bytes": job.predicted["peak"],
        "size": {"dense_bytes": dense, "out_bytes": written},
        "positions": folder_positions(job.checkpoint.folder),
        "architecture": type(job.stream.model).__name__,
        "device": str(job.device),
        "dtype": job.dtype_name,
        "threads": torch.get_num_threads(),
        "processes": job.processes.world,
        "versions": job.versions,
        "warnings": list(job.warnings),
        **({"shapes": shapes(reports)} if isinstance(job.method, Shape) else {}),
    }
