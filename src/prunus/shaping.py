"""The main job for methods that make shapes smaller: find widths → look → decide → cut, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.edits import Narrow, Split, bias_of, blank, narrow, revalue
from prunus.errors import ModelError
from prunus.evidence import Evidence, of_inputs
from prunus.job import Job
from prunus.methods.shape import Plan, Shape, Uneven
from prunus.models.checkpoint import Checkpoint
from prunus.models.pool import attach_pools, check_keep, close, fewer, per_expert
from prunus.models.thin import INNER, OUTER, attach_thin, insert, refuse_split, split
from prunus.models.weights import Cut
from prunus.models.widths_of import NARROWED, attach_widths, difference
from prunus.output import Output
from prunus.progress import Progress
from prunus.ranges import ranges, read_ranges
from prunus.shapes.legal import Legal
from prunus.sites import Block, Pool, SiteInfo, Width
from prunus.stream import Step
from prunus.survey import Survey


def decide(job: Job, method: Shape, output: Output, evidence: Evidence, progress: Progress) -> Plan:
    """Find the widths, look at the dense model as the method asks, and let it decide.

    Raises:
        ModelError: the model has no widths of the kinds that the method narrows.
        RecipeError: the sparsity cannot be reached.
    """
    refuse_split(job.stream.blocks)
    if method.touches:
        if "experts" in method.touches:
            # Dense blocks show what a block returns, before those of an earlier call are narrowed.
            job.stream.calls([job.probe])
            attach_pools(job.stream.blocks)
        elif "ranks" in method.touches:
            job.warnings.extend(attach_thin(job.stream, job.probe))
        else:
            job.warnings.extend(attach_widths(job.stream, job.probe, method.touches))
    legal = None
    # Of experts any number will do, as long as it is one.
    if job.recipe.prune.portable and isinstance(method, Uneven) and "experts" not in method.touches:
        legal = Legal(job.folder, job.stream.blocks, method.bias)
    survey = Survey(job.stream, job.batches, job.work, progress, evidence, legal)
    plan = method.plan(survey, job.sparsity)
    job.stream.dropped = plan.dropped
    output.leave_out(plan.dropped)
    return plan


def cut(
    job: Job, method: Shape, output: Output, plan: Plan, evidence: Evidence, progress: Progress
) -> list[dict[str, Any]]:
    """Cut every block that is not finished; returns the reports of all, dropped ones included."""
    blocks = [block for block in job.stream.blocks if block.name not in plan.dropped]
    dense = {block.name: list(block.infos) for block in job.stream.blocks}
    reports = {block.name: job.processes.agree(output.report(block)) for block in blocks}
    for block in blocks:
        if reports[block.name]:
            restore(block, reports[block.name])

    def finished(block: Block) -> Checkpoint | None:
        if not reports[block.name]:
            return None
        # Where blocks only go, those that stay are as they were; their shards have other numbers in their names.
        return job.stream.weights.checkpoint if plan.dropped else output.shard(block)

    progress.stage("prune", len(blocks))
    job.resumed = sum(report is not None for report in reports.values())
    for _ in range(job.resumed):
        progress.advance("finished before")
    batches = job.batches if method.gathers else job.batches[-1:]
    for step in job.stream.walk(batches, of_inputs(method.gathers), finished):
        begun = time.monotonic()
        stats = evidence.of(step, method.gathers) if method.gathers else {}
        edits = method.narrow(step.block, stats, plan)
        report = _block(job, step, dense[step.block.name], edits)
        report |= {"seconds": time.monotonic() - begun, **plan.reports.get(step.block.name, {})}
        changed, cuts = _changed(step.block, [edit for edit in edits if isinstance(edit, Narrow)])
        splits = _splits(step.block, report["ranks"])
        job.processes.on_first(partial(output.block, step.block, report, changed, cuts, splits=splits))
        reports[step.block.name] = report
        progress.advance(step.block.name, error=report["error"])
    for block in job.stream.blocks:
        if block.name in plan.dropped:
            reports[block.name] = _gone(block.name, dense[block.name])
    return [report for block in job.stream.blocks if (report := reports.get(block.name))]


def restore(block: Block, report: Mapping[str, Any]) -> None:
    """Give a finished block of an earlier call its smaller shapes, before its weights are loaded."""
    for made in report["biases"]:
        slot = block.slot(made)
        rows = slot.info.shape[0]
        slot.module.bias = nn.Parameter(torch.empty(rows, device="meta"), requires_grad=False)
    for name, kept in report["kept"].items():
        site = _site(block, name)
        if isinstance(site, Pool):
            fewer(block, site, read_ranges(kept, site.groups))
        else:
            narrow(block, site, read_ranges(kept, site.groups))
    for name, rank in report["ranks"].items():
        insert(block, name, rank)


@torch.no_grad()
def _block(job: Job, step: Step, dense: list[SiteInfo], edits: Sequence[Narrow | Split]) -> dict[str, Any]:
    """Narrow one block, check that this computes what masking does, and run it again; returns its report."""
    block = step.block
    without = {slot.info.name for slot in block.slots if bias_of(slot) is None}
    worst = _cut(job, block, edits) if edits else 0.0
    ranks = {edit.name: edit.rank for edit in edits if isinstance(edit, Split)}
    matrices, slots = [], iter(block.slots)
    for info in dense:
        kept, rank = next(slots).info, ranks.get(info.name)
        gone = info.size - (kept.size if rank is None else kept.size + next(slots).info.size)
        matrices.append({
            "name": info.name, "shape": list(info.shape),
            "kept_shape": list(kept.shape if rank is None else info.shape),
            "wanted": gone / info.size, "sparsity": gone / info.size, "zeros": gone, "unseen": False,
            **({} if rank is None else {"rank": rank}),
        })  # fmt: skip
    size, gone = sum(info.size for info in dense), sum(matrix["zeros"] for matrix in matrices)
    share = gone / size if size else 0.0
    made = [slot.info.name for slot in block.slots if bias_of(slot) is not None and slot.info.name in without]
    return {
        "name": block.name, "sparsity": share, "wanted": share, "error": step.propagate(), "matrices": matrices,
        "idle": [], "kept": {edit.name: ranges(edit.keep) for edit in edits if isinstance(edit, Narrow)},
        "biases": made, "narrowed": worst, "ranks": ranks,
    }  # fmt: skip


def _cut(job: Job, block: Block, edits: Sequence[Narrow | Split]) -> float:
    """Cut, and compare with the block masked at its full shape, on the probe.

    Raises:
        ModelError: they compute different things; nothing sound can be saved then.
    """
    probe = job.probe
    assert probe.hidden is not None
    inputs = probe.hidden.to(job.device)
    stored = job.stream.weights.dtype
    edits = [_rounded(block, edit, stored) if isinstance(edit, Split) else edit for edit in edits]
    for edit in edits:
        _mask(block, edit, stored)
    masked = probe.calls[block.name](block.module, inputs)
    for edit in edits:
        if isinstance(edit, Split):
            split(block, edit)
        elif isinstance(site := _site(block, edit.name), Pool):
            fewer(block, site, edit.keep)
        else:
            narrow(block, site, edit.keep)
    worst = difference(probe.calls[block.name](block.module, inputs), masked)
    if not worst <= NARROWED[masked.dtype]:
        raise ModelError(
            f"{block.name}: narrowed, it computes something else than masked (relative difference {worst:.2g}, allowed "
            f"{NARROWED[masked.dtype]:.0e}). Please report this model; --set method.kinds=neurons may do."
        )
    return worst


def _mask(block: Block, edit: Narrow | Split, stored: Callable[[str], torch.dtype]) -> None:
    """Make a block compute, at its full shape, what the edit will make it compute."""
    if isinstance(edit, Split):
        block.slot(edit.name).matrix().weight.copy_(edit.outer @ edit.inner)
    elif isinstance(site := _site(block, edit.name), Pool):
        check_keep(site, edit.keep)
        close(block, site, edit.keep)
    else:
        revalue(block, edit, stored)
        blank(block, site, edit.keep)


def _rounded(block: Block, edit: Split, stored: Callable[[str], torch.dtype]) -> Split:
    """The factors as they will be read back."""
    kind = stored(block.slot(edit.name).parameter)
    return replace(edit, outer=edit.outer.to(kind).to(edit.outer), inner=edit.inner.to(kind).to(edit.inner))


def _splits(block: Block, ranks: Mapping[str, int]) -> dict[str, str]:
    """Parameters that were made -> those in whose place they stand."""
    made = {f"{name}.{part}.weight": f"{name}.weight" for name in ranks for part in (INNER, OUTER)}
    biased = [name for name in ranks if bias_of(block.slot(f"{name}.{OUTER}")) is not None]
    return made | {f"{name}.{OUTER}.bias": f"{name}.bias" for name in biased}


def _changed(block: Block, edits: Sequence[Narrow]) -> tuple[set[str], dict[str, list[Cut]]]:
    """Parameters that differ from the checkpoint, and the cuts of those that are smaller."""
    changed: set[str] = set()
    cuts: dict[str, list[Cut]] = {}

    def note(parameter: str, axis: int, kept: Tensor) -> None:
        changed.add(parameter)
        cuts.setdefault(parameter, []).append((axis, kept.nonzero().flatten()))

    for edit in edits:
        width = _site(block, edit.name)
        if isinstance(width, Pool):
            # Already cut, so the tensors have one entry for each expert that stays.
            after = replace(width, groups=int(edit.keep.sum()))
            for parameter, _, _ in per_expert(block, after):
                note(parameter, 0, edit.keep)
            continue
        for rows, members in ((True, width.rows), (False, width.columns)):
            for member in members:
                slot, kept = block.slot(member.matrix), member.kept(edit.keep)
                note(slot.parameter, 0 if rows != slot.transposed else 1, kept)
                if bias_of(slot) is not None:
                    bias = f"{slot.parameter.rpartition('.')[0]}.bias"
                    note(bias, 0, kept) if rows else changed.add(bias)
    return changed, cuts


def _site(block: Block, name: str) -> Width | Pool:
    """What an edit of this name narrows."""
    return next(site for site in (*block.widths, *block.pools) if site.name == name)


def _gone(name: str, infos: list[SiteInfo]) -> dict[str, Any]:
    """The report of a block that was dropped."""
    matrices = [
        {"name": info.name, "shape": list(info.shape), "kept_shape": [0, 0], "wanted": 1.0, "sparsity": 1.0,
         "zeros": info.size, "unseen": False}
        for info in infos
    ]  # fmt: skip
    return {
        "name": name, "sparsity": 1.0, "wanted": 1.0, "error": None, "matrices": matrices, "idle": [], "kept": {},
        "biases": [], "narrowed": 0.0, "ranks": {}, "dropped": True,
    }  # fmt: skip


def shapes(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the shapes: blocks gone, biases made, matrices split, the largest narrowed - masked difference."""
    return {
        "blocks": [report["name"] for report in reports if report.get("dropped")],
        "biases": sum(len(report["biases"]) for report in reports),
        "split": sum(len(report["ranks"]) for report in reports),
        "narrowed_difference": max(report["narrowed"] for report in reports),
    }
