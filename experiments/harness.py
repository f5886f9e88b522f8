"""Prune and judge in one walk, without writing a checkpoint: what the experiments run thousands of times.

The windows of the evaluation text travel behind the calibration samples as batches that count in no statistic; behind
the last block the head gives their losses. Everything else is the product's own code.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunus import memory
from prunus.data.reading import read
from prunus.distributed import Processes
from prunus.engine import _block, _budget
from prunus.evaluation.windows import Windows, cut
from prunus.evidence import Evidence, of_inputs
from prunus.job import Job, prepare
from prunus.models.source import locate
from prunus.notes import collecting
from prunus.progress import Silent
from prunus.recipe import Recipe
from prunus.stream import Batch


def judge(
    model: str,
    prune: Mapping[str, Any],
    calibration: Mapping[str, Any],
    texts: Mapping[str, Mapping[str, Any]],
    dtype: str = "auto",
) -> dict[str, Any]:
    """Perplexities of a model after pruning.

    Args:
        model: as in a recipe.
        prune: the recipe's `prune`.
        calibration: the recipe's `calibration`.
        texts: name → `{"text": …, "length": …, "indices": numbers of windows}`.
        dtype: of the forward passes, those of the evaluation too, as in a recipe.

    Returns:
        `windows` (text → mean loss of each window, nats a token), `perplexity` (text → number), `sparsity`,
        `budget` (block → sparsity), `seconds` (by stage), `cpu_seconds` (of all threads, what a shared machine leaves
        comparable), `peak_rss_bytes`, `warnings`.
    """
    warnings: list[str] = []
    with tempfile.TemporaryDirectory() as folder, collecting(warnings):
        recipe = Recipe(model=model, prune=dict(prune), calibration=dict(calibration), dtype=dtype)
        job = prepare(recipe, Path(folder) / "out", overwrite=False, processes=Processes(), warnings=warnings)
        job.begin(restart=True)
        try:
            return {**_judge(job, texts), "warnings": warnings}
        finally:
            job.work.close()


def _judge(job: Job, texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    begun, worked = time.perf_counter(), time.process_time()
    evidence = Evidence(job.stream, job.batches, job.work, Silent(), job.needs)
    evidence.prepare()
    budget = _budget(job, evidence, Silent())
    seconds["survey"] = time.perf_counter() - begun
    pairs = {
        name: [_cut(job.recipe.model, text["text"], text["length"]).pair(index) for index in text["indices"]]
        for name, text in texts.items()
    }
    batches = {name: [Batch({"input_ids": inputs}, 0) for inputs, _ in own] for name, own in pairs.items()}
    together = [*job.batches[:-1], *(batch for own in batches.values() for batch in own), job.probe]
    cpu = {"survey": time.process_time() - worked}
    reports, spent, spent_cpu = [], 0.0, 0.0
    for step in job.stream.walk(together, of_inputs(job.method.needs)):
        started, started_cpu = time.perf_counter(), time.process_time()
        reports.append(_block(job, step, evidence.of(step, job.method.needs), budget)[0])
        spent += time.perf_counter() - started
        spent_cpu += time.process_time() - started_cpu
    seconds["prune"] = spent
    losses = {name: _losses(job, own, [target for _, target in pairs[name]]) for name, own in batches.items()}
    size = sum(matrix["shape"][0] * matrix["shape"][1] for report in reports for matrix in report["matrices"])
    zeros = sum(matrix["zeros"] for report in reports for matrix in report["matrices"])
    seconds["total"] = time.perf_counter() - begun
    cpu |= {"prune": spent_cpu, "total": time.process_time() - worked}
    return {
        "windows": losses,
        "perplexity": {name: float(torch.tensor(own).mean().exp()) for name, own in losses.items()},
        "sparsity": zeros / size,
        "budget": {report["name"]: report["wanted"] for report in reports},
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_rss_bytes": memory.peak(),
    }


@lru_cache(maxsize=8)
def _cut(model: str, text: str, length: int) -> Windows:
    return cut(read(text, purpose="evaluation"), locate(model), length, "auto")


@torch.no_grad()
def _losses(job: Job, batches: list[Batch], targets: list[Tensor]) -> list[float]:
    """Mean loss of each window, nats a token, from the hidden states behind the last block."""
    found = []
    tower = job.stream.blocks[-1].tower
    with job.stream.ends() as ends:
        for batch, wanted in zip(batches, targets, strict=True):
            assert batch.hidden is not None
            logits = ends(batch.inputs, {tower: batch.hidden}).cpu()[0, : len(wanted)]
            found.append(float(cross_entropy(logits.float(), wanted)))
    return found
