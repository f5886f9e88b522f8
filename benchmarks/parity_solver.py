"""Our SparseGPT solver against masks that the published one made of the same Hessian and the same weights.

    python benchmarks/parity_solver.py --gold shared/gold --model MODEL [--block 5]

MODEL is anything `prunus prune` takes; its weights must be those the gold file was made with (SmolLM2-135M-Instruct,
Q4_1, dequantised). Prints one line of JSON: the share of equal mask entries per setting.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from prunus.methods.compose import compose
from prunus.models.source import locate
from prunus.sites import Matrix
from prunus.statistics import Gram, SiteStats

SITE = "model.layers.5.self_attn.q_proj"
SETTINGS = {"u50": ("unstructured", 0.5), "u70": ("unstructured", 0.7), "n2m4": ("2:4", 0.5)}


def weight_of(model: str) -> Tensor:
    """The dense q_proj, float32 `[out, in]`."""
    for file in sorted(locate(model).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if f"{SITE}.weight" in tensors.keys():  # noqa: SIM118 - not a mapping
                return tensors.get_tensor(f"{SITE}.weight").float()
    raise SystemExit(f"{model} has no {SITE}")


def statistics_of(packed: np.ndarray, width: int) -> SiteStats:
    """A Gram whose `hessian` is the stored one, given its upper triangle."""
    hessian = torch.zeros(width, width)
    upper = torch.triu_indices(width, width)
    hessian[upper[0], upper[1]] = torch.from_numpy(packed)
    gram = Gram(width)
    gram.update(torch.zeros(1, width), 2)  # two samples: the factor 2 / samples is 1
    gram.tensors()[0].copy_(hessian + hessian.T - hessian.diagonal().diag())
    return SiteStats({Gram: gram}, SITE)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gold", type=Path, required=True, help="folder with sparsegpt_layer5_qproj_H_n16.npz")
    parser.add_argument("--model", required=True, help="the dense model")
    options = parser.parse_args()
    gold = np.load(options.gold / "sparsegpt_layer5_qproj_H_n16.npz")
    weight = weight_of(options.model)
    stats = statistics_of(gold["H_upper"], weight.shape[1])
    result = {}
    for name, (pattern, sparsity) in SETTINGS.items():
        for compat in ("reference", "exact"):
            method, _ = compose("sparsegpt", pattern=pattern, compat=compat)
            mask = method.prune(Matrix(SITE, weight, ""), stats, sparsity).mask.numpy()
            kept = np.unpackbits(gold[f"{name}.keep_packed"], count=mask.size).astype(bool).reshape(mask.shape)
            result[f"{name}.{compat}"] = {"differ": int((kept != mask).sum()), "equal": float((kept == mask).mean())}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
