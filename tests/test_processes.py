"""Two processes that share the calibration text decide as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

MODEL = Path(__file__).parent / "assets" / "stories260k"
# Two batches of 32 samples × 64 tokens, one for each process.
OPTIONS = ["--samples", "64", "--length", "64", "--quiet", "--json"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "chosen",
    [
        ["--method", "sparsegpt"],
        ["--method", "alps", "--ignore", "*.layers.[1-9]"],  # statistics of two shapes; the search amplifies rounding
        ["--method", "gblm"],  # the reverse walk
        ["--method", "wanda++"],
        ["--method", "dsnot", "--allocation", "ecoflap", "--set", "allocation.order=first"],
    ],
    ids=lambda chosen: chosen[1],
)
def test_masks_of_two_processes_equal_those_of_one(chosen: list[str], tmp_path: Path) -> None:
    command, options = ["-m", "prunus", "prune", str(MODEL)], [*chosen, *OPTIONS]
    subprocess.run([sys.executable, *command, str(tmp_path / "one"), *options], check=True, capture_output=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *command, str(tmp_path / "two"), *options], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    kept = [((one[name] != 0) == (two[name] != 0)).float() for name in one if "layers" in name and one[name].ndim == 2]
    assert torch.cat([mask.flatten() for mask in kept]).mean() >= 0.9999


@pytest.mark.parametrize("allocation", ["search", "ecoflap"])
def test_two_processes_agree_on_what_trials_decide(allocation: str, tmp_path: Path) -> None:
    """The first process measures, with its own samples; both must walk the same way, or they would wait for ever."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "prunus", "prune", str(MODEL), str(tmp_path / "two"), "--allocation", allocation, *OPTIONS]
    few = ["--set", "allocation.trials=5"] if allocation == "search" else ["--set", "allocation.samples=1"]
    done = subprocess.run([*launcher, *command, *few], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len({round(block["wanted"], 6) for block in json.loads(done.stdout)["blocks"]}) > 1


def test_too_few_samples_for_the_processes_is_refused(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        *launcher,
        "-m",
        "prunus",
        "prune",
        str(MODEL),
        str(tmp_path / "out"),
        "--samples",
        "4",
        "--length",
        "64",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "2 processes need as many batches" in done.stderr
    assert not (tmp_path / "out").exists()
