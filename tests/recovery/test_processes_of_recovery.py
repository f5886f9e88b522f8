"""Two processes that share each batch learn what one learns, under the same masks; none waits for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MODEL, TEXT, is_site, tensors_of

from prunus.cli import main

OPTIONS = [
    "--steps",
    "6",
    "--batch",
    "4",
    "--length",
    "32",
    "--heldout",
    "5",
    "--text",
    str(TEXT),
    "--lr",
    "2e-3",
    "-q",
]
# The dense model's predictions are written by one process and read by both; A is pruned by what both have seen.
CHOSEN = [
    "--method",
    "prilora",
    "--objective",
    "logits",
    "--set",
    "objective.top_k=16",
    "--set",
    "every=2",
    "--lr",
    "2e-3",
]


def test_two_processes_recover_what_one_recovers(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*CHOSEN, *OPTIONS, "--dense", str(MODEL), "--json"]
    assert main(["recover", str(pruned), str(tmp_path / "one"), *words]) == 0
    one = json.loads(capsys.readouterr().out)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "prunus", "recover", str(pruned), str(tmp_path / "two"), *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert two["processes"] == 2
    assert one["loss"]["after"] < one["loss"]["before"]
    for when in ("before", "after"):
        assert two["loss"][when] == pytest.approx(one["loss"][when], abs=1e-4)
    assert two["zeros"] == one["zeros"]
    assert (tmp_path / "one" / "prunus.masks").read_bytes() == (tmp_path / "two" / "prunus.masks").read_bytes()
    before, mine, theirs = (tensors_of(folder) for folder in (pruned, tmp_path / "one", tmp_path / "two"))
    for name in filter(is_site, before):
        moved, apart = (mine[name] - before[name]).norm(), (mine[name] - theirs[name]).norm()
        assert bool((before[name] == 0).eq(theirs[name] == 0)[before[name] == 0].all())
        assert apart < 0.02 * moved, (name, float(apart / moved))
    logs = [(tmp_path / name / "recovery.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [torch.tensor([json.loads(line)["loss"] for line in log]) for log in logs]
    assert torch.allclose(*losses, atol=1e-4)
