"""The reverse walk gives the gradients of the stock model's full backward pass, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, save_tiny, tiny_inputs
from prunus.distributed import Processes
from prunus.errors import ModelError
from prunus.evidence import Evidence
from prunus.gradients import LossGradientL1, LossGradientL2, RegionalGradient
from prunus.job import Job, prepare
from prunus.progress import Silent
from prunus.recipe import Recipe
from prunus.statistics import InputNorm

SAMPLES, LENGTH = 3, 16
BOTH = frozenset({LossGradientL1, LossGradientL2})


def job_for(family: str, folder: Path, method: str = "gblm") -> Job:
    if not (folder / "dense").exists():
        save_tiny(FAMILIES[family], folder / "dense")
        inputs = tiny_inputs(FAMILIES[family], samples=SAMPLES, length=LENGTH)
        np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    recipe = Recipe(
        model=str(folder / "dense"),
        calibration={"source": str(folder / "inputs.npz"), "samples": SAMPLES, "length": LENGTH},
        prune={"method": method},
    )
    return prepare(recipe, folder / "out", overwrite=False, processes=Processes(), warnings=[])


def measured(job: Job, progress: Silent | None = None, kinds: frozenset = BOTH) -> dict[str, dict]:
    """Matrix → kind → value of the reverse walk."""
    job.begin(restart=False)
    evidence = Evidence(job.stream, job.batches, job.work, progress or Silent(), kinds)
    try:
        evidence.prepare()
        return {
            name: {kind: gradient.mean for kind, gradient in sums.items()}
            for block in job.stream.blocks
            for name, sums in evidence.reverse.read(block, kinds).items()
        }
    finally:
        job.work.close()


def full_backward(job: Job, folder: Path) -> dict[str, dict]:
    """The same from one resident stock model, sample by sample, the loss as transformers computes it."""
    stock = type(job.stream.model).from_pretrained(folder / "dense").eval()
    parameters = dict(stock.named_parameters())
    slots = [slot for block in job.stream.blocks for slot in block.slots]
    sums = {slot.info.name: {kind: torch.zeros(slot.info.shape) for kind in BOTH} for slot in slots}
    ids = tiny_inputs(FAMILIES["llama"], samples=SAMPLES, length=LENGTH)["input_ids"]
    for row in ids:
        stock.zero_grad()
        stock(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        for slot in slots:
            gradient = parameters[slot.parameter].grad
            if gradient is not None:
                sums[slot.info.name][LossGradientL1] += slot.view(gradient).abs() / SAMPLES
                sums[slot.info.name][LossGradientL2] += slot.view(gradient).square() / SAMPLES
    return {
        name: {LossGradientL1: kinds[LossGradientL1], LossGradientL2: kinds[LossGradientL2].sqrt()}
        for name, kinds in sums.items()
    }


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma3_text", "mixtral", "gpt_oss", "gpt_neox", "qwen3_moe", "bloom", "phi3"]
)
def test_gradients_are_those_of_the_full_backward_pass(family: str, tmp_path: Path) -> None:
    job = job_for(family, tmp_path)
    ours, theirs = measured(job), full_backward(job, tmp_path)
    assert ours.keys() == theirs.keys()
    for name, kinds in theirs.items():
        assert family in ("mixtral", "gpt_oss", "qwen3_moe") or kinds[LossGradientL1].any(), name
        for kind, wanted in kinds.items():
            torch.testing.assert_close(ours[name][kind], wanted, rtol=2e-4, atol=1e-7, msg=lambda m, n=name: f"{n} {m}")


class Stopping(Silent):
    """Progress that is interrupted after so many steps."""

    def __init__(self, after: int):
        self.left = after

    def advance(self, *args: object, **kwargs: object) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [2, 3, 4, 5])
def test_an_interrupted_walk_goes_on_and_gives_the_same_bits(after: int, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    whole = measured(job_for("llama", tmp_path / "once"))
    with pytest.raises(KeyboardInterrupt):
        measured(job_for("llama", tmp_path / "twice"), Stopping(after))
    job = job_for("llama", tmp_path / "twice")
    again = measured(job)
    assert all(torch.equal(again[name][kind], whole[name][kind]) for name in whole for kind in BOTH)
    left = {path.name for path in (job.work.folder / "reverse").iterdir()}
    assert left == {f"sums-{number}.safetensors" for number in range(len(job.stream.blocks))}


def test_the_dense_model_is_unchanged_and_nothing_requires_gradients_afterwards(tmp_path: Path) -> None:
    job = job_for("mixtral", tmp_path)
    measured(job)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in job.stream.model.parameters())


def test_regional_gradients_are_those_of_the_norm_of_the_block(tmp_path: Path) -> None:
    job = job_for("llama", tmp_path, "wanda++")
    kinds = frozenset({InputNorm, RegionalGradient})
    evidence = Evidence(job.stream, job.batches, job.work, Silent(), kinds)
    for step in job.stream.walk(job.batches, frozenset({InputNorm})):
        ours = {name: stats[RegionalGradient].mean for name, stats in evidence.of(step, kinds).items()}
        for slot in step.block.slots:
            parameter = getattr(slot.module, slot.attribute).requires_grad_(True)
            total = torch.zeros(slot.info.shape)
            for batch in job.batches[:-1]:
                with torch.enable_grad():
                    out = batch.calls[step.block.name](step.block.module, batch.hidden)
                    (gradient,) = torch.autograd.grad(out.norm(), parameter)
                total += gradient.square() / SAMPLES
            parameter.requires_grad_(False)
            torch.testing.assert_close(ours[slot.info.name], total.sqrt(), rtol=1e-4, atol=1e-7)


def test_several_towers_are_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--blocks"):
        measured(job_for("clip", tmp_path))


def test_a_model_without_a_language_model_head_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    save_tiny(FAMILIES["llama"], tmp_path / "whole")
    LlamaForCausalLM.from_pretrained(tmp_path / "whole").model.save_pretrained(tmp_path / "dense")
    inputs = tiny_inputs(FAMILIES["llama"], samples=SAMPLES, length=LENGTH)
    np.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    with pytest.raises(ModelError, match="head"):
        measured(job_for("llama", tmp_path))
