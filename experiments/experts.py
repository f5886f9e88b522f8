"""What removing experts costs a mixture that really was trained: every method, held-out text, and the probe's numbers.

    python experiments/upcycle.py tests/assets/stories260k MODEL --text FILE [FILE ...]
    python experiments/experts.py run --model MODEL --out results.jsonl
    python experiments/experts.py noise --model smollm2 --text wikitext2 --out results.jsonl
    python experiments/experts.py table --out results.jsonl

`noise` asks what the probe's number means: how much worse a dense model predicts when so much of every feed-forward
block's output, by its energy, is replaced by noise.

Methods decide as in `prunus prune`, from rows that the model was trained on; it is then judged in memory with the
routers closed for the experts that go, which computes what slicing them does (every `prune` checks that). Each run is a
line of JSON; what the file already holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunus.data.reading import read as read_text
from prunus.distributed import Processes
from prunus.evaluation.windows import cut as cut_windows
from prunus.evidence import Evidence
from prunus.job import prepare
from prunus.methods.shape import Plan
from prunus.models.discover import find_blocks
from prunus.models.pool import attach_pools, closed
from prunus.models.source import locate
from prunus.notes import collecting
from prunus.output import Output
from prunus.progress import Silent
from prunus.recipe import Recipe
from prunus.shaping import decide
from prunus.sites import Block
from prunus.versions import versions

SAMPLES, LENGTH, SEEDS = 64, 128, 3
REMOVED = (0.25, 0.5)
SHARES, NOISY = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0), 4
RUNS: dict[str, dict[str, Any]] = {
    "reap": {"method": "reap"},
    "naee": {"method": "naee"},
    "moe-i2": {"method": "moe-i2"},
    "moe-i2, uniform": {"method": "moe-i2", "settings": {"method.counts": "uniform"}},
    "moe-i2, by rank": {"method": "moe-i2", "settings": {"method.counts": "rank"}},
    "moe-i2, no fields": {"method": "moe-i2", "settings": {"choice.span": 1, "method.counts": "uniform"}},
    "reap, inverse": {"method": "reap", "settings": {"method.counts": "inverse"}},
    "frequency": {"method": "frequency"},
    "output-norm": {"method": "output-norm"},
    **{f"random {seed}": {"seed": seed} for seed in range(SEEDS)},
}


def main() -> None:
    """Run what is missing, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("run", "noise", "table"))
    parser.add_argument("--model", type=Path, help="a folder; for noise also an alias")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", default="wikitext2", help="for noise")
    parser.add_argument("--shares", type=float, nargs="+", help="of the experts to remove, or of noise")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    {"run": run, "noise": noise, "table": lambda asked: table(read(asked.out))}[asked.task](asked)


def run(asked: argparse.Namespace) -> None:
    """Run what is missing in the result file."""
    beside = asked.model.with_name(f"{asked.model.name}.rows")
    held = [torch.from_numpy(numpy.load(file)) for file in sorted(beside.glob("held-*.npy"))]
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    blocks = find_blocks(model)
    attach_pools(blocks)
    done = {(row["model"], row["name"], row["share"]) for row in read(asked.out)}
    for name, share in [("dense", 0.0), *((name, share) for share in asked.shares or REMOVED for name in asked.runs)]:
        if (asked.model.name, name, share) in done:
            continue
        begun = time.perf_counter()
        keep, more = _decided(asked.model, beside / "train.npy", blocks, RUNS.get(name), share)
        seconds = time.perf_counter() - begun
        row = {
            "model": asked.model.name, "name": name, "share": share, "losses": losses(model, blocks, keep, held),
            "left": [int(mask.sum()) for mask in keep.values()], **more, "seconds": round(seconds, 1),
            "versions": versions(),
        }  # fmt: skip
        _write(asked.out, row)


@torch.no_grad()
def noise(asked: argparse.Namespace) -> None:
    """Losses of a dense model whose feed-forward outputs change by so much."""
    folder = locate(str(asked.model))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = cut_windows(read_text(asked.text, purpose="evaluation"), folder, 512, "auto")
    rows = torch.cat([windows.pair(number)[0] for number in range(NOISY)])
    done = {(row["model"], row["name"], row["share"]) for row in read(asked.out)}
    for share in asked.shares or SHARES:
        if (str(asked.model), "noise", share) in done:
            continue
        generator = torch.Generator().manual_seed(0)

        def disturbed(module: Any, args: tuple, out: Tensor, share: float = share, dice: Any = generator) -> Tensor:
            change = torch.randn(out.shape, generator=dice)
            return out + share**0.5 * out.norm(dim=-1, keepdim=True) * change / change.norm(dim=-1, keepdim=True)

        found = [part for name, part in model.named_modules() if name.endswith(".mlp")]
        handles = [part.register_forward_hook(disturbed) for part in found]
        loss = float(model(input_ids=rows, labels=rows).loss)
        for handle in handles:
            handle.remove()
        _write(asked.out, {
            "model": str(asked.model), "name": "noise", "share": share, "losses": [loss], "blocks": len(found),
            "versions": versions(),
        })  # fmt: skip


def _write(path: Path, row: dict[str, Any]) -> None:
    """Add a line, and show it."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    values = (f"{math.exp(loss):.3f}" for loss in row["losses"])
    print(row["model"], row["name"], row["share"], *values, flush=True)


def _decided(
    model: Path, text: Path, blocks: list[Block], how: Mapping[str, Any] | None, share: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Masks of all mixtures, and what the probe said."""
    pools = [pool for block in blocks for pool in block.pools]
    if how is None:
        return {pool.name: torch.ones(pool.groups, dtype=torch.bool) for pool in pools}, {}
    if "seed" in how:
        dice = random.Random(how["seed"])
        gone = {pool.name: dice.sample(range(pool.groups), round(share * pool.groups)) for pool in pools}
        return {pool.name: ~torch.isin(torch.arange(pool.groups), torch.tensor(gone[pool.name])) for pool in pools}, {}
    inside = sum(int(pool.weights.sum()) for pool in pools)
    sparsity = share * inside / sum(info.size for block in blocks for info in block.infos)
    plan, warnings = planned(model, text, {**how, "sparsity": sparsity})
    probed = [one for report in plan.reports.values() for one in report["experts"].values()]
    told = {key: sum(one[key] for one in probed) / len(pools) for key in ("routed", "cosine", "entropy")}
    lost = sum(one["lost"][-1] for one in probed) / len(pools)
    return dict(plan.keep), {"lost": lost, **told, "warnings": warnings}


def planned(model: Path, text: Path, prune: Mapping[str, Any]) -> tuple[Plan, list[str]]:
    """What `prunus prune` decides before the first cut, and its warnings."""
    warnings: list[str] = []
    calibration = {"source": str(text), "samples": SAMPLES, "length": LENGTH}
    with tempfile.TemporaryDirectory() as folder, collecting(warnings):
        recipe = Recipe(model=str(model), prune=dict(prune), calibration=calibration)
        job = prepare(recipe, Path(folder) / "out", overwrite=False, processes=Processes(), warnings=warnings)
        job.begin(restart=True)
        try:
            evidence = Evidence(job.stream, job.batches, job.work, Silent(), job.needs)
            return decide(job, job.method, Output(job), evidence, Silent()), warnings
        finally:
            job.work.close()


@torch.no_grad()
def losses(model: Any, blocks: list[Block], keep: Mapping[str, Tensor], held: list[Tensor]) -> list[float]:
    """Mean loss of a token of each text, nats, with only these experts."""
    with ExitStack() as stack:
        for block in blocks:
            for pool in block.pools:
                stack.enter_context(closed(block, pool, keep[pool.name]))
        return [float(model(input_ids=rows, labels=rows).loss) for rows in held]


def table(rows: list[dict[str, Any]]) -> None:
    """Perplexities on all held-out texts together, one line per way, one column per model and share."""
    noisy = {(row["model"], row["share"]): row["losses"][0] for row in rows if row["name"] == "noise"}
    for (model, share), loss in noisy.items():
        print(f"{model}: {100 * share:g} % noise, perplexity x {math.exp(loss - noisy[model, 0.0]):.2f}")
    rows = [row for row in rows if row["name"] != "noise"]
    found = {(row["model"], row["share"], row["name"]): row for row in rows}
    columns = sorted({(row["model"], row["share"]) for row in rows if row["share"]})
    dense = {row["model"]: row for row in rows if row["name"] == "dense"}
    print("| " + " | ".join(["", *(f"{model}, {100 * share:g} %" for model, share in columns)]) + " |")
    print("|---|" + "--:|" * len(columns))
    print("| dense | " + " | ".join(_mean([dense[model]]) for model, _ in columns) + " |")
    for name, members in _lines():
        cells = [[found[key] for one in members if (key := (*column, one)) in found] for column in columns]
        print(f"| {name} | " + " | ".join(_mean(cell) for cell in cells) + " |")


def _lines() -> Iterator[tuple[str, list[str]]]:
    yield from ((name, [name]) for name in RUNS if not name.startswith("random"))
    yield f"random, mean of {SEEDS}", [name for name in RUNS if name.startswith("random")]


def _mean(rows: list[dict[str, Any]]) -> str:
    """Perplexity: exp of the mean loss over texts (and rows)."""
    values = [loss for row in rows for loss in row["losses"]]
    return f"{math.exp(sum(values) / len(values)):.2f}" if values else "-"


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a result file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


if __name__ == "__main__":
    main()
