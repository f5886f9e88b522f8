"""kill -9 at any moment, the same command again: the same bytes as a run that was never killed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parent / "assets" / "stories260k"

# Every durable change of the run is a rename; die in front of the n-th one, or in front of the last clean-up.
DYING = """
import os, pathlib, shutil, signal, sys
limit, renames = int(sys.argv[1]), 0
rename, remove = pathlib.Path.replace, shutil.rmtree

def dying_rename(self, target):
    global renames
    renames += 1
    if renames == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

def dying_remove(path, *args, **kwargs):
    if limit == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    if limit == -2:
        remove(pathlib.Path(path) / "survey")
        os.kill(os.getpid(), signal.SIGKILL)
    return remove(path, *args, **kwargs)

unlink = pathlib.Path.unlink
def dying_unlink(self, missing_ok=False):
    if limit == -3 and self.name == "run.json" and self.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return unlink(self, missing_ok=missing_ok)

pathlib.Path.unlink = dying_unlink

pathlib.Path.replace, shutil.rmtree = dying_rename, dying_remove
from prunus.cli import main
code = main(sys.argv[2:])
print("renames", renames, file=sys.stderr)
sys.exit(code)
"""


def run(out: Path, limit: int = 0, *more: str) -> subprocess.CompletedProcess:
    options = ["prune", str(MODEL), str(out), "--method", "sparsegpt", "--sparsity", "0.6", "--allocation", "owl"]
    options += ["--samples", "4", "--length", "64", "--quiet", "--json", *more]
    command = [sys.executable, "-c", DYING, str(limit), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def digests(folder: Path) -> dict[str, str]:
    """Hashes of every file but the two that hold measured seconds and bytes."""
    files = [path for path in folder.iterdir() if path.name not in ("prunus.json", "README.md")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An uninterrupted run, and how many renames it made."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run(out)
    assert done.returncode == 0, done.stderr
    return out, int(done.stderr.split("renames")[1])


@pytest.mark.parametrize("point", [0.0, 0.5, 1.0])
def test_a_killed_run_ends_with_the_same_bytes(point: float, whole: tuple[Path, int], tmp_path: Path) -> None:
    reference, renames = whole
    out = tmp_path / "out"
    killed = run(out, limit=1 + round(point * (renames - 1)))
    assert killed.returncode == -9
    assert not out.exists()
    again = run(out)
    assert again.returncode == 0, again.stderr
    assert digests(out) == digests(reference)
    assert not list(tmp_path.glob(".out*"))


def test_a_run_killed_after_publishing_is_finished(whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, limit=-3).returncode == -9
    assert out.exists()
    again = run(out)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["sparsity"]["reached"] == pytest.approx(0.6, abs=1e-3)
    assert digests(out) == digests(whole[0])
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("limit", [-1, -2])
def test_what_a_half_removed_work_folder_holds_is_not_used(limit: int, whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, limit=limit).returncode == -9
    shutil.rmtree(out)
    again = run(out, 0, "--seed", "1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["resumed_blocks"] == 0


def test_later_blocks_are_not_pruned_twice(whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, limit=whole[1] - 4)
    again = run(out)
    assert json.loads(again.stdout)["resumed_blocks"] == 5


def test_another_command_does_not_continue_it(whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, limit=whole[1] // 2)
    other = run(out, 0, "--seed", "1")
    assert other.returncode == 2
    assert "--restart" in other.stderr
    assert "recipe.calibration.seed: 0 → 1" in other.stderr
    fresh = run(out, 0, "--seed", "1", "--restart")
    assert fresh.returncode == 0, fresh.stderr


def test_an_old_folder_survives_a_kill_at_any_rename(whole: tuple[Path, int], tmp_path: Path) -> None:
    reference, renames = whole
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("old")
    (out / "config.json").write_text("{}")
    # One rename more than without an old folder: the old one steps aside just before the new one takes its place.
    for limit in (renames // 2, renames, renames + 1):
        assert run(out, limit, "--overwrite", "--restart").returncode == -9
        beside = tmp_path / ".out.prunus" / "replaced" / "precious"
        assert (out / "precious").exists() or beside.exists()
    assert run(out, 0, "--overwrite").returncode == 0
    assert digests(out) == digests(reference)


def test_a_run_that_is_refused_before_its_first_measurement_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = run(out, 0, "--allocation", "ecoflap", "--set", "allocation.ceiling=0.3")
    assert refused.returncode == 2
    assert "allocation.ceiling is 0.3" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_does_not_touch_the_work_of_another_process(tmp_path: Path) -> None:
    from prunus.errors import RecipeError
    from prunus.work import Work

    owner, other = Work(tmp_path / "out"), Work(tmp_path / "out")
    owner.begin({"recipe": 1}, restart=False)
    with pytest.raises(RecipeError, match="Another prunus process"):
        other.begin({"recipe": 1}, restart=False)
    other.close_refused()
    assert owner.read("run.json") == {"recipe": 1}
    owner.close(remove=True)
