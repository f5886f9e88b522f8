"""A pruned stories260k made by hand, as a foreign tool would leave it, and jobs on it without a command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prunus.distributed import Processes
from prunus.progress import Silent
from prunus.recipe import recipe
from prunus.recovery.job import RecoveryJob, prepare
from prunus.recovery.recovery import Outcome

ASSETS = Path(__file__).parent.parent / "assets"
MODEL, TEXT = ASSETS / "stories260k", ASSETS / "tinystories-head.txt"
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = {"steps": 6, "batch": 4, "length": 32, "heldout": 4, "text": str(TEXT), "lr": 2e-3}
# Whatever a test leaves open, the fixture in conftest.py closes.
OPEN: list[RecoveryJob] = []


def is_site(name: str) -> bool:
    return any(f".{site}." in name for site in SITES)


def half(weight: torch.Tensor) -> torch.Tensor:
    """The larger half of each row, by magnitude."""
    order = weight.abs().float().argsort(dim=1)
    return torch.zeros_like(weight).scatter(1, order[:, weight.shape[1] // 2 :], 1) * weight


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The larger two of every four."""
    groups = weight.unflatten(1, (-1, 4))
    order = groups.abs().float().argsort(dim=2)
    return (torch.zeros_like(groups).scatter(2, order[..., 2:], 1) * groups).flatten(1)


def make(folder: Path, *, cut=half, dtype: torch.dtype = torch.float32) -> Path:
    """Stories260k with zeros in its matrices; columns that 4 does not divide are cut by halves."""
    shutil.copytree(MODEL, folder)
    tensors = load_file(MODEL / "model.safetensors")
    for name, tensor in tensors.items():
        own = half if tensor.shape[-1] % 4 else cut
        tensors[name] = (own(tensor) if is_site(name) else tensor).to(dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_registry(folder: Path) -> Path:
    """The registry of a model made above, and in every block one kept weight of up_proj that is zero."""
    from prunus.recovery.masks import FILE, Masks

    tensors, masks = load_file(folder / "model.safetensors"), Masks()
    for name, tensor in tensors.items():
        if is_site(name):
            masks.add(name.removesuffix(".weight"), tensor != 0)
            if ".up_proj." in name:
                row, column = (tensor != 0).nonzero()[7].tolist()
                tensor[row, column] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    masks.write(folder / FILE)
    return folder


def job_of(folder: Path, out: Path, method: str, **part: Any) -> RecoveryJob:
    """A job that passed its checks and has taken its work folder."""
    settings = part.pop("settings", {})
    asked = recipe({"model": str(folder), "recover": {"method": method, "settings": settings, **SMALL, **part}})
    job = prepare(asked, out, overwrite=False, processes=Processes(), warnings=[])
    OPEN.append(job)
    job.begin(False)
    return job


def run(job: RecoveryJob) -> Outcome:
    """The recovery up to the written files; nothing is verified or published."""
    return job.recovery.recover(job, Silent())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
