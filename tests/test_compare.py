"""A comparison: which rows there are, that they run, fail, stop and go on by themselves, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import prunus
from prunus.cli import main
from prunus.comparison.grid import entries
from prunus.comparison.row import read
from prunus.comparison.run import plan
from prunus.comparison.shared import Shared
from prunus.comparison.table import dense_rows
from prunus.errors import PrunusError, RecipeError
from prunus.evaluation import guard
from prunus.evaluation.guard import Collapsed, check_ratio, probe_warning
from prunus.progress import Silent
from prunus.recipe import Recipe
from prunus.webpage.gather import gather
from prunus.work import Work

ASSETS = Path(__file__).parent / "assets"
MODEL, TEXT = ASSETS / "stories260k", ASSETS / "tinystories-head.txt"
SMALL: dict[str, Any] = {
    "calibration": str(TEXT), "samples": 4, "length": 64, "text": str(TEXT), "eval_length": 64, "windows": 4,
}  # fmt: skip


# --- which rows ----------------------------------------------------------------------------------------------------


def test_every_value_meets_every_other_once_and_names_say_what_differs() -> None:
    found = entries([], models=["m"], options={"method": "wanda,magnitude", "sparsity": "0.5,0.6,0.5", "seed": 1})
    assert [entry.name for entry in found] == ["wanda-0.5", "wanda-0.6", "magnitude-0.5", "magnitude-0.6"]
    assert all(entry.recipe.calibration.seed == 1 and entry.recipe.evaluate is not None for entry in found)
    lists = entries([], models=["m"], options={"method": ["wanda", "magnitude"], "sparsity": [0.5, 0.6], "seed": [1]})
    assert [entry.recipe for entry in lists] == [entry.recipe for entry in found]


def test_a_fixed_pattern_meets_the_sparsities_once() -> None:
    found = entries([], models=["m"], options={"pattern": "unstructured,2:4,4:8", "sparsity": "0.5,0.7"})
    assert [entry.name for entry in found] == ["unstructured-0.5", "unstructured-0.7", "2of4", "4of8"]


def test_files_meet_models_and_options_override_them(tmp_path: Path) -> None:
    for name, method in (("a", "wanda"), ("b", "magnitude")):
        (tmp_path / f"{name}.yaml").write_text(f"model: own\nprune: {{method: {method}, sparsity: 0.3}}\n")
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    found = entries(files, models=["x/one", "two"], options={"sparsity": "0.4"})
    assert [entry.name for entry in found] == ["a-one-0.4", "a-two-0.4", "b-one-0.4", "b-two-0.4"]
    assert [entry.recipe.model for entry in found] == ["x/one", "two"] * 2
    assert {entry.recipe.prune.sparsity for entry in found} == {0.4}
    again = entries([files[0], files[0]])
    assert [entry.name for entry in again] == ["a", "a~2"]
    assert again[0].recipe.model == "own"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method wanda,wandaa", "Did you mean 'wanda'"),
        ("--sparsity 0.5,,0.6", "--sparsity .* has an empty value"),
        ("--sparsity 0.5,50", "--sparsity must be a number"),
        ("--models , --sparsity 0.5", "--models is missing"),
        ("nowhere.yaml", "There is no recipe nowhere.yaml"),
        ("--max-ppl-ratio 0.5", "--max-ppl-ratio must be"),
        ("--text none --tasks arc_easy --max-ppl-ratio 3", "leave one out"),
        ("--text none", "nothing to measure"),
    ],
)
def test_a_slip_of_the_pen_is_answered_before_anything_is_made(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words.split() if "--models" in words else ["--models", str(MODEL), *words.split()]
    assert main(["compare", *given, "--out", str(tmp_path / "out"), "-q"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_dense_model_stands_above_its_rows_with_what_it_scored() -> None:
    def line(name: str, dense: float | None, **tasks: float) -> dict[str, Any]:
        scores = {task: {"acc": 0.5, "dense": acc} for task, acc in tasks.items()}
        return {"model": name, "dense_perplexity": dense, "tasks": scores}

    lines = [line("m", 9.0), line("m", 9.0, arc=0.25), line("m", 9.0, arc=0.25), line("n", None, arc=0.5)]
    lines += [line("m", 9.0, arc=0.75), line("broken", None)]
    assert dense_rows(lines, ["arc"]) == [
        ("dense m", "", "9.00", "1.00", "0.250", ""),
        ("dense n", "", "", "", "0.500", ""),
        ("dense m", "", "9.00", "1.00", "0.750", ""),
    ]
    assert dense_rows([line("m", 1e308)], []) == [("dense m", "", "1.0e+308", "1.00", "")]


# --- rows that run, fail and stop ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three rows: one that does, one that falls off the cliff, one that cannot be (64 inputs are no groups of 7)."""
    out = tmp_path_factory.mktemp("compare") / "grid"
    options = {**SMALL, "method": "magnitude", "pattern": ["unstructured", "3:7"], "sparsity": [0.2, 0.9]}
    return out, prunus.compare(models=[MODEL], out=out, max_ppl_ratio=4, **options)


def test_a_recipe_that_recovers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\nrecover: {method: masklora}\n")
    with pytest.raises(RecipeError, match="does not recover yet"):
        entries([tmp_path / "r.yaml"])


def test_a_row_that_fails_or_collapses_leaves_the_others_alone(grid: tuple[Path, dict[str, Any]]) -> None:
    _, result = grid
    rows = {row["name"]: row for row in result["rows"]}
    assert result["counts"] == {"done": 1, "collapsed": 1, "failed": 1}
    assert rows["unstructured-0.2"]["ratio"] < 4 < rows["unstructured-0.9"]["ratio"]
    assert rows["unstructured-0.2"]["reached"] == pytest.approx(0.2, abs=0.01)
    assert "M=7" in rows["3of7"]["why"]
    assert "at most 4 times" in rows["unstructured-0.9"]["why"]
    assert "It writes: “Once upon a time" in rows["unstructured-0.9"]["why"]


@pytest.mark.slow
def test_the_numbers_are_those_of_prune_and_evaluate_alone(grid: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    prunus.prune(MODEL, tmp_path / "out", method="magnitude", sparsity=0.2, calibration=TEXT, samples=4, length=64)
    alone = prunus.evaluate(tmp_path / "out", baseline=MODEL, text=TEXT, length=64, windows=4)
    row = grid[1]["rows"][0]
    assert (row["perplexity"], row["dense_perplexity"]) == (alone["perplexity"], alone["baseline"]["perplexity"])


def test_the_folder_holds_the_data_the_table_and_the_page_but_no_model(grid: tuple[Path, dict[str, Any]]) -> None:
    out, result = grid
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.rglob("*.partial"))
    stored = read(out / "runs" / "unstructured-0.2" / "result.json")
    assert stored["prune"]["blocks"]
    assert stored["evaluate"]["baseline"]["sample"].startswith("Once upon a time")
    lines = (out / "table.csv").read_text("utf-8").splitlines()
    assert len(lines) == 4
    assert str(out) not in (out / "table.csv").read_text("utf-8")
    if result["report"]:
        assert "unstructured-0.9" in Path(result["report"]).read_text("utf-8")


def test_what_is_done_is_not_done_again_and_what_failed_is_tried_again(
    grid: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = grid
    table = (out / "table.csv").read_bytes()
    called: list[str] = []
    engine = import_module("prunus.engine")
    original = engine.prune

    def prune(recipe: Any, *others: Any, **more: Any) -> Any:
        called.append(recipe.prune.pattern)
        return original(recipe, *others, **more)

    monkeypatch.setattr(engine, "prune", prune)
    options = {**SMALL, "method": "magnitude", "pattern": ["unstructured", "3:7"], "sparsity": [0.2, 0.9]}
    again = prunus.compare(models=[MODEL], out=out, max_ppl_ratio=4, **options)
    assert called == ["3:7"]
    assert again["rows"] == before["rows"]
    assert (out / "table.csv").read_bytes() == table


def test_a_restart_that_is_interrupted_leaves_no_old_row_to_the_next_call(
    grid: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "grid"
    shutil.copytree(grid[0], out)
    options = {**SMALL, "method": "magnitude", "sparsity": [0.2, 0.9]}
    asked = entries([], models=[str(MODEL)], options=options)
    folders = [out / "runs" / entry.name for entry in asked]
    (out / "runs" / "unstructured-0.2").rename(folders[0])
    (out / "runs" / "unstructured-0.9").rename(folders[1])
    assert all((folder / "result.json").is_file() for folder in folders)
    _, rows = plan(asked, out, False, Shared(), True)
    assert not rows and not any((folder / "result.json").exists() for folder in folders)


def test_rows_of_other_versions_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = entries([], models=[str(MODEL)], options={**SMALL, "sparsity": 0.3})
    shared = Shared()
    before = shared.row_key(entry.recipe), shared.dense_key(entry.recipe)
    assert (Shared().row_key(entry.recipe), Shared().dense_key(entry.recipe)) == before
    monkeypatch.setattr("prunus.comparison.shared.decisive", lambda: {"torch": "0.1"})
    assert shared.row_key(entry.recipe) != before[0]
    assert shared.dense_key(entry.recipe) != before[1]


def test_a_row_that_cannot_begin_is_on_the_page_with_its_reason(
    grid: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "grid"
    shutil.copytree(grid[0], out)
    files = [tmp_path / f"{name}.yaml" for name in ("good", "bad")]
    for file, source in zip(files, (TEXT, tmp_path / "nowhere.txt"), strict=True):
        file.write_text(f"calibration: {{source: {source}, samples: 4, length: 64}}\nprune: {{method: magnitude}}\n")
    options = {name: value for name, value in SMALL.items() if name in ("text", "eval_length", "windows")}
    result = prunus.compare(files, models=[MODEL], out=out, **options)
    assert result["counts"] == {"done": 1, "collapsed": 0, "failed": 1}
    shown = {run.name: run for run in gather([out])}
    # The rows of the earlier call are no longer asked for; the failed one has no folder and is there all the same.
    assert set(shown) == {"good", "bad"} and shown["good"].status == "done"
    assert shown["bad"].status == "failed" and "nowhere.txt" in shown["bad"].why


def test_a_fault_with_one_dense_model_costs_its_own_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(MODEL, tmp_path / "other")
    module = import_module("prunus.comparison.run")

    def ask(recipe: Recipe, *_: Any) -> None:
        if Path(recipe.model).name == "other":
            raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "ask_dense", ask)
    monkeypatch.setattr(
        module, "make", lambda order, *_: {"name": order.name, "recipe": dict(order.recipe), "status": "done"}
    )
    result = prunus.compare(models=[tmp_path / "other", MODEL], out=tmp_path / "out", method="magnitude", **SMALL)
    rows = {row["name"]: row for row in result["rows"]}
    assert result["counts"] == {"done": 1, "collapsed": 0, "failed": 1} and rows["stories260k"]["status"] == "done"
    assert rows["other"]["why"] == "a fault of prunus, see dense/error.txt: RuntimeError: out of memory"
    assert "in ask" in (tmp_path / "out" / "dense" / "error.txt").read_text("utf-8")


def test_a_folder_that_is_no_comparison_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds files but no comparison"):
        prunus.compare(models=[MODEL], out=tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_when_nothing_can_be_run_the_reason_is_the_answer(tmp_path: Path) -> None:
    with pytest.raises(PrunusError, match="No recipe could be run:\nWindows of 4096 tokens are longer"):
        prunus.compare(
            models=[MODEL], out=tmp_path / "out", **{**SMALL, "eval_length": 4096, "method": ["wanda", "ria"]}
        )


# --- interruptions -------------------------------------------------------------------------------------------------


def command(out: Path) -> list[str]:
    words = [sys.executable, "-m", "prunus", "compare", "--models", str(MODEL), "--out", str(out), "-q"]
    words += ["--method", "magnitude,wanda", "--sparsity", "0.3,0.5"]
    return words + [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.slow
def test_killed_five_times_the_table_is_the_same(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert subprocess.run(command(whole), check=False, capture_output=True).returncode == 0
    kills = 0
    for stage in ("dense/*.json", "runs/magnitude-0.3/key.json", "runs/magnitude-0.3/checkpoint/prunus.json",
                  "runs/magnitude-0.5/result.json", "runs/wanda-0.3/.checkpoint.prunus/done/*.json"):  # fmt: skip
        process = subprocess.Popen(command(broken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(broken.glob(stage)):
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 5
    assert subprocess.run(command(broken), check=False, capture_output=True).returncode == 0
    assert (broken / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a local Ray cluster of two workers with one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made.address
    made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_on_a_cluster_of_two_workers_the_table_is_the_same(
    cluster: str, grid: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    options = {**SMALL, "method": "magnitude", "pattern": ["unstructured", "3:7"], "sparsity": [0.2, 0.9]}
    result = prunus.compare(models=[MODEL], out=tmp_path / "out", max_ppl_ratio=4, ray=cluster, **options)
    assert result["rows"] == grid[1]["rows"]
    assert (tmp_path / "out" / "table.csv").read_bytes() == (grid[0] / "table.csv").read_bytes()


# --- the guard -----------------------------------------------------------------------------------------------------


def test_prune_stops_at_the_cliff_publishes_nothing_and_goes_on_under_a_higher_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(MODEL), str(tmp_path / "out"), "--method", "magnitude", "--sparsity", "0.8", "-q", "--json"]
    words += ["--calibration", str(TEXT), "--samples", "4", "--length", "64"]
    assert main([*words, "--max-ppl-ratio", "1.5"]) == 2
    said = capsys.readouterr().err
    assert "Quality fell off a cliff" in said
    assert "It writes: “Once upon a time" in said
    assert not (tmp_path / "out").exists()
    assert main([*words, "--max-ppl-ratio", "1e6"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["resumed_blocks"] == 5
    assert 1.5 < result["guard"]["ratio"] < 1e6


def test_run_holds_a_finished_model_against_a_limit_that_came_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(limit: float | None, **evaluate: Any) -> dict[str, Any]:
        question = {"text": str(TEXT), "length": 64, "windows": 2, **evaluate, "max_ppl_ratio": limit}
        data = {
            "model": str(MODEL), "out": str(tmp_path / "out"), "evaluate": question,
            "prune": {"method": "magnitude", "sparsity": 0.8},
            "calibration": {"source": str(TEXT), "samples": 4, "length": 64},
        }  # fmt: skip
        return prunus.run(Recipe.model_validate(data))

    measured: list[str] = []
    measure = guard._measure
    monkeypatch.setattr(
        guard, "_measure", lambda recipe, model, progress: measured.append(model) or measure(recipe, model, progress)
    )
    assert asked(None)["prune"]["guard"] is None
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(Collapsed, match=r"at most 1\.5 times was allowed.* was made before this limit was set"):
        asked(1.5)
    assert measured == [str(MODEL), str(tmp_path / "out")]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    found = asked(1e6)
    assert found["skipped"] == ["prune", "evaluate"]
    assert 1.5 < found["prune"]["guard"]["ratio"] < 1e6 and found["prune"]["guard"]["limit"] == 1e6
    with pytest.raises(Collapsed):
        asked(1.5)
    assert len(measured) == 2  # the same question of the same models is not asked again
    assert asked(1e6, bos="never")["prune"]["guard"]["asked"]["bos"] == "never"
    assert len(measured) == 4


def test_without_a_limit_a_collapse_is_only_told_and_a_small_loss_is_not() -> None:
    dense = {"perplexity": 10.0}
    assert check_ratio({"perplexity": 20.0}, dense, None, "") is None
    assert "has collapsed" in str(check_ratio({"perplexity": 200.0}, dense, None, ""))
    assert check_ratio({"perplexity": 200.0}, dense, 20.0, "") is None
    with pytest.raises(Collapsed, match="Nothing was done"):
        check_ratio({"perplexity": 200.1}, dense, 20.0, "Nothing was done.")


def test_the_probe_warns_only_where_guessing_is_better() -> None:
    ids = torch.tensor([[1, 2, 3, 1]])
    right = torch.full((1, 4, 5), 0.0).scatter_(2, ids.roll(-1)[..., None], 3.0)
    assert probe_warning(right, ids) is None
    assert probe_warning(right * 0.01, ids) is None
    assert "worse than guessing" in str(probe_warning(-right, ids))
    assert probe_warning(-right, None) is None
    assert probe_warning(-right[..., :3], ids) is None


def test_the_dense_reference_counts_only_for_the_question_that_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, int | None]] = []

    def measure(recipe: Recipe, model: str, progress: Any) -> dict[str, Any]:
        assert recipe.evaluate is not None
        measured.append((Path(model).name, recipe.evaluate.windows))
        return {"perplexity": 2.0}

    monkeypatch.setattr(guard, "_measure", measure)
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    os.utime(other / "model.safetensors", (0, 0))  # as far as a hash of the files' states tells, other weights
    work = Work(tmp_path / "out")
    work.folder.mkdir()
    for windows, limit, dense in ((1, 2, None), (1, 3, None), (2, 3, None), (2, 3, str(other)), (2, 4, str(other))):
        recipe = Recipe(model=str(MODEL), evaluate={"windows": windows, "max_ppl_ratio": limit})
        guard.dense_reference(recipe, work, Silent(), dense)
    # A higher limit alone asks nothing new; other windows do, and so does another dense model.
    assert measured == [(MODEL.name, 1), (MODEL.name, 2), ("other", 2)]
