"""Masks and perplexities beside those of the original implementations, on the same tokens and windows.

    python benchmarks/parity.py --gold DIR --folder /tmp/prunus-parity [--only wanda50 …] [--out FILE.json]

The gold folder holds what the originals gave for SmolLM2-135M: calibration ids, masks of four matrices, hashes of all
masks, and perplexities (in its README, repeated below with their source). Runs one method at a time and keeps each
row in the result file, so that it can be stopped and continued.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch

import prunus
from prunus.evaluation.perplexity import evaluate
from prunus.models.checkpoint import Checkpoint

# name → options, stem of the gold files (None: no masks there), perplexity of the original, allowed deviation.
# The perplexities at 70 % are those that the originals gave in the same protocol; they come without masks.
CASES: dict[str, tuple[dict, str | None, float | None, float]] = {
    "magnitude50": ({"method": "magnitude", "compat": "reference"}, "magnitude50_n16", 527.89, 0.005),
    "wanda50": ({"method": "wanda"}, "wanda50_n16", 53.133, 0.005),
    "sparsegpt50": ({"method": "sparsegpt", "compat": "reference"}, "sparsegpt50_n16", 45.622, 0.02),
    "sparsegpt50-exact": ({"method": "sparsegpt"}, "sparsegpt50_n16", 45.622, 0.02),
    "gblm50": ({"method": "gblm", "compat": "reference"}, "gblm50_l1_n16", 52.66, 0.01),
    "sparsegpt70": ({"method": "sparsegpt", "sparsity": 0.7, "compat": "reference"}, None, 183.0, 0.09),
    "sparsegpt70-owl": (
        {"method": "sparsegpt", "sparsity": 0.7, "allocation": "owl", "compat": "reference"}, None, 191.0, 0.09
    ),
    "wanda70": ({"method": "wanda", "sparsity": 0.7}, None, None, 0.005),
    "wanda70-owl": ({"method": "wanda", "sparsity": 0.7, "allocation": "owl"}, None, None, 0.005),
    "ria50": ({"method": "ria"}, None, None, 0.005),
}  # fmt: skip
WINDOWS = [0, 54, 108, 162, 216, 270]


def compare_masks(folder: Path, gold: Path, stem: str) -> dict:
    """Equal matrices by hash, and shares of equal weights where the masks themselves are kept."""
    checkpoint = Checkpoint.open(folder)
    hashes = json.loads((gold / f"{stem}_all_mask_sha256.json").read_text())
    masks = {name: (tensor != 0).numpy().astype(np.uint8) for name, tensor in checkpoint.read(hashes)}
    equal = [hashlib.sha256(masks[name].tobytes()).hexdigest() == value for name, value in hashes.items()]
    shares = {}
    with np.load(gold / f"{stem}.npz") as packed:
        for key in packed.files:
            if key.endswith(".keep_packed"):
                mask = masks[f"model.{key.removesuffix('.keep_packed')}.weight"].ravel()
                theirs = np.unpackbits(packed[key])[: mask.size]
                shares[key.removesuffix(".keep_packed")] = float((mask == theirs).mean())
    return {"matrices": len(equal), "matrices_equal": sum(equal), "share_equal": shares}


def run(name: str, gold: Path, folder: Path) -> dict:
    """Prune, compare masks, evaluate."""
    options, stem, theirs, _ = CASES[name]
    out = folder / name
    pruned = prunus.prune(
        "smollm2",
        out,
        calibration=str(gold / "calibration_16x512.npy"),
        samples=16,
        length=512,
        overwrite=True,
        **options,
    )
    row = {"options": options, "sparsity": pruned["sparsity"], "seconds": pruned["seconds"]}
    row |= {"versions": pruned["versions"], "threads": pruned["threads"]}
    if stem:
        row["masks"] = compare_masks(out, gold, stem)
    found = evaluate(str(out), text=str(gold / "wikitext2_test_ids.npy"), length=1024, indices=WINDOWS)
    row |= {"perplexity": found["perplexity"], "original": theirs}
    row["deviation"] = None if theirs is None else found["perplexity"] / theirs - 1
    row["within"] = None if theirs is None else abs(row["deviation"]) <= CASES[name][3]
    shutil.rmtree(out)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gold", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for pruned models, removed one by one")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity.json"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.only:
        if name in rows:
            continue
        rows[name] = run(name, arguments.gold, arguments.folder)
        row = rows[name]
        masks = row.get("masks", {})
        equal = f"{masks.get('matrices_equal', '-')}/{masks.get('matrices', '-')}"
        print(
            f"{name:18s} perplexity {row['perplexity']:9.3f}  original {row['original'] or float('nan'):9.3f}  "
            f"masks equal {equal}  {masks.get('share_equal', '')}",
            flush=True,
        )
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
