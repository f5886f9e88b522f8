"""What a cap on windows of columns costs in perplexity, with and without an order of columns.

    python benchmarks/pattern_cost.py --model smollm2 [--cases 0.5,0.6]

Wanda with the dense model's activations on a few samples of WikiText-2 (one shot: unlike `prunus prune`, which sees the
pruned outputs of earlier blocks), perplexity on the first windows of its test split; the same for every row, so that
rows compare. Writes `benchmarks/results/pattern_cost.json` after every row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import prunus
from prunus.data.reading import read
from prunus.evaluation.loading import load_model
from prunus.evaluation.perplexity import measure
from prunus.evaluation.windows import cut
from prunus.models.discover import find_blocks
from prunus.models.source import locate
from prunus.patterns import NM, Capped, Pattern, Unstructured
from prunus.progress import Silent

RESULTS = Path(__file__).parent / "results" / "pattern_cost.json"
SAMPLES, LENGTH, WINDOWS = 8, 512, 6
# A cap a third above the mean, and where the sparsity is one of N:16 the exact pattern.
CAPS = {0.5: 10, 0.6: 8, 0.7: 6}


def patterns(sparsity: float) -> dict[str, Pattern]:
    """What is compared at one sparsity."""
    k = CAPS[sparsity]
    found: dict[str, Pattern] = {
        "unstructured": Unstructured(),
        f"capped:{k}/16 permuted": Capped(k, 16, permute=True),
        f"capped:{k}/16": Capped(k, 16),
    }
    return found | ({"8:16 permuted": NM(8, 16, permute=True), "8:16": NM(8, 16)} if sparsity == 0.5 else {})


@torch.inference_mode()
def norms(model: Any, matrices: dict[str, torch.nn.Module], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Norm of every input of every matrix over the samples."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            square = inputs[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, 0) + square

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in matrices.items()]
    for row in ids:
        model.base_model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


def masked(weight: torch.Tensor, norm: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """The weight without what the pattern takes away."""
    scores = weight.abs() * norm
    order = pattern.arrange(scores, sparsity)
    if order is None:
        return weight * pattern.keep(scores, sparsity)
    mask = torch.empty_like(scores, dtype=torch.bool)
    mask[:, order] = pattern.keep(scores[:, order], sparsity)
    return weight * mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cases", default="0.5,0.6,0.7")
    given = parser.parse_args()
    folder = locate(given.model)
    model = load_model(folder)
    matrices = {slot.info.name: slot.module for block in find_blocks(model) for slot in block.slots}
    dense = {name: module.weight.detach().clone() for name, module in matrices.items()}  # type: ignore[union-attr]
    reading = read("wikitext2", purpose="calibration")
    ids = cut(reading, folder, LENGTH, "never").ids
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:SAMPLES]]
    found = norms(model, matrices, ids)
    plan = cut(read("wikitext2", purpose="evaluation"), folder, LENGTH, "auto")
    rows: list[dict[str, Any]] = []
    for sparsity in map(float, given.cases.split(",")):
        for name, pattern in patterns(sparsity).items():
            for matrix, module in matrices.items():
                module.weight.data = masked(dense[matrix], found[matrix], pattern, sparsity)  # type: ignore[union-attr]
            result = measure(model, plan, range(WINDOWS), progress=Silent())
            rows.append({"sparsity": sparsity, "pattern": name, "perplexity": result["perplexity"]})
            print(rows[-1], flush=True)
            record = {
                "model": given.model, "metric": "wanda, one shot", "samples": SAMPLES, "length": LENGTH,
                "windows": WINDOWS, "prunus": prunus.__version__, "rows": rows,
            }  # fmt: skip
            RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
