"""`--speedup 1.3`: how much has to go until this machine makes tokens so much faster, found by timing stand-ins.

A stand-in has the shapes that a share of the blocks' weights leaves, and zeros for weights: how long a matrix product
takes does not depend on its values. What is timed is transformers, in float32, one token after the other, beside the
dense model and in turns with it. The result itself is timed once more when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from prunus.bench.run import Setup, race
from prunus.errors import RecipeError
from prunus.job import Job
from prunus.methods.depth.depth import Depth
from prunus.methods.shape import Shape
from prunus.models.thin import refuse_split
from prunus.models.widths_of import attach_widths
from prunus.progress import Progress
from prunus.shapes.standin import narrow_evenly, write_standin
from prunus.sites import Block, Width

ENGINE = "hf-fp32"
PHASES = ("decode", "prefill")
# Stand-ins that are timed between the whole model and the smallest one, at most; and how near is near enough.
TRIALS = 5
NEAR = 0.02


@dataclass(frozen=True)
class Trial:
    """A share and what it gave.

    Attributes:
        share: of the weights of all blocks' matrices that is gone.
        factor: tokens a second of decoding, as a multiple of the dense model's.
        axes: what of each kind is left, `{"blocks": [23, 30]}`.
    """

    share: float
    factor: float
    axes: Mapping[str, Sequence[int]]


Measure = Callable[[float], Trial]


def resolve(job: Job, progress: Progress) -> None:
    """Set the job's sparsity to the share that gives the asked factor, and keep how it was found.

    Raises:
        RecipeError: no share gives it; says what can be reached.
    """
    wanted = job.recipe.prune.speedup
    assert wanted is not None
    found = job.processes.agree(job.work.read("speedup.json"))
    if found is None:
        steps = _steps(job)
        progress.stage("speedup", TRIALS)
        trials = job.processes.on_first(lambda: [asdict(one) for one in search(wanted, steps, _timer(job, progress))])
        found = {"wanted": wanted, "trials": trials, "chosen": trials[-1]}
        job.processes.on_first(partial(job.work.write, "speedup.json", found))
    job.sparsity = found["chosen"]["share"]


def measured(job: Job, progress: Progress) -> dict[str, Any]:
    """The result beside the dense model, in turns: `wanted`, `chosen`, `trials`, `engine`, `threads`, `reached`."""
    found = job.work.read("speedup.json")
    progress.stage("speedup", 1)
    rows = race({"dense": job.folder, "result": job.work.checkpoint}, ENGINE, setup=_setup())
    progress.advance("result")
    reached = {phase: rows["result"][phase] / rows["dense"][phase] for phase in PHASES}
    return {**found, "engine": ENGINE, "threads": _setup().threads, "reached": reached, "tokens_per_second": rows}


def shortfall(found: Mapping[str, Any]) -> list[str]:
    """What the user should know if the result is slower than was asked."""
    wanted, reached = found["wanted"], found["reached"]["decode"]
    if reached >= wanted * (1 - NEAR):
        return []
    return [
        f"Asked for {wanted:g} x in decoding, and the result reaches {reached:.2f} x: blocks of their own shapes, or "
        "what else ran on this machine, made it slower than the stand-in. Ask for a little more, or measure again."
    ]


def search(wanted: float, shares: Sequence[float], measure: Measure) -> list[Trial]:
    """Trials on the way to a share; the last one is chosen.

    The time of a token is nearly a straight line over the share, so each trial is where the line through the two
    nearest measured shares meets the wanted time.

    Args:
        wanted: tokens a second, as a multiple of the dense model's; above 1.
        shares: those that can be, ascending, from 0 on.
        measure: times one.

    Raises:
        RecipeError: the largest share does not give it.
    """
    low, high = Trial(0.0, 1.0, {}), measure(shares[-1])
    trials = [high]
    if high.factor < wanted:
        raise RecipeError(
            f"--speedup {wanted:g} cannot be reached: with {high.share:.1%} of the blocks' weights gone, the most that "
            f"this method can remove, this machine decodes {high.factor:.2f} x as fast as the dense model "
            f"({ENGINE}). Ask for 1 to {int(100 * high.factor) / 100:g}."
        )
    while len(trials) < TRIALS and high.factor > wanted * (1 + NEAR):
        between = [share for share in shares if low.share < share < high.share]
        if not between:
            break
        slope = (1 / high.factor - 1 / low.factor) / (high.share - low.share)
        aim = low.share + (1 / wanted - 1 / low.factor) / slope
        trial = measure(min(between, key=lambda share: abs(share - aim)))
        trials.append(trial)
        if trial.factor >= wanted:
            high = trial
        else:
            low = trial
    return [*(one for one in trials if one is not high), high]


def _steps(job: Job) -> list[float]:
    """Shares that the method can reach, ascending, from 0 on.

    Raises:
        RecipeError: a matrix of the model is a product of two already.
    """
    blocks, method = job.stream.blocks, job.method
    refuse_split(blocks)
    if isinstance(method, Depth):
        free = len(blocks) - method.first - method.last
        most = min(free, len(blocks) - 1)
        return [count / len(blocks) for count in range(max(most, 0) + 1)]
    assert isinstance(method, Shape), "others were refused with the budget"
    attach_widths(job.stream, job.probe, method.touches)
    size = sum(info.size for block in blocks for info in block.infos)
    most = sum(int(width.weights.sum() - width.weights.min()) for width in _widths(job))
    return [step / 1000 for step in range(int(1000 * most / size) + 1)]


def _widths(job: Job) -> list[Width]:
    """The widths that may be narrowed: not those of blocks that the method leaves alone."""
    blocks = job.stream.blocks
    first, last = (getattr(job.method, name, 0) for name in ("first", "last"))
    return [width for block in blocks[first : max(first, len(blocks) - last)] for width in block.widths]


def _timer(job: Job, progress: Progress) -> Measure:
    def measure(share: float) -> Trial:
        with TemporaryDirectory(dir=job.work.folder, prefix="standin-") as scratch:
            folder = Path(scratch) / "model"
            axes = _write(job, share, folder)
            rows = race({"dense": job.folder, "stand-in": folder}, ENGINE, setup=_setup())
        factor = rows["stand-in"]["decode"] / rows["dense"]["decode"]
        progress.advance(f"{share:.1%} gone: {factor:.2f} x")
        return Trial(share, factor, axes)

    return measure


def _write(job: Job, share: float, folder: Path) -> dict[str, list[int]]:
    """A stand-in without this share; returns what of each kind is left of how much."""
    blocks: list[Block] = job.stream.blocks
    trust = job.recipe.trust_remote_code
    if isinstance(job.method, Depth):
        gone = round(share * len(blocks))
        write_standin(job.stream.weights, blocks, folder, dropped=blocks[len(blocks) - gone :], trust_remote_code=trust)
        return {"blocks": [len(blocks) - gone, len(blocks)]}
    left = narrow_evenly(_widths(job), blocks, share)
    write_standin(job.stream.weights, blocks, folder, left=left, trust_remote_code=trust)
    axes: dict[str, list[int]] = {}
    for width in (width for block in blocks for width in block.widths):
        kind = "groups of heads" if width.kind == "heads" else width.kind
        kept, whole = axes.setdefault(kind, [0, 0])
        axes[kind] = [kept + left.get(width.name, width.groups), whole + width.groups]
    return axes


def _setup() -> Setup:
    return Setup(tokens=24, prompt=64, rounds=3, threads=torch.get_num_threads())
