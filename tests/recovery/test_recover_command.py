"""`prunus recover` and `prunus merge` as a user meets them: what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import MODEL, TEXT, tensors_of

from prunus.cli import main
from prunus.recovery import RECOVERIES

QUICK = ["--steps", "6", "--batch", "4", "--length", "32", "--heldout", "4", "--text", str(TEXT), "--lr", "2e-3", "-q"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["recover", *words]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_the_result_has_the_promised_keys_and_out_is_whole(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["recover", str(pruned), str(out), "--method", "masklora", *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = ("method", "trainable", "trainable_share", "seconds", "peak_rss_bytes", "loss", "zeros", "verify")
    assert all(key in found for key in keys)
    assert found["zeros"]["before"] == found["zeros"]["after"] > 0
    assert found["loss"]["after"] < found["loss"]["before"]
    assert found["trainable_share"] == found["trainable"] / found["parameters"]
    assert (out / "prunus.masks").is_file()
    assert not list(tmp_path.glob(".out*"))
    log = [json.loads(line) for line in (out / "recovery.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 7))
    assert {"step", "seconds", "loss", "lr", "heldout"} == log[0].keys()
    assert log[0]["lr"] == 0
    assert max(line["lr"] for line in log) == pytest.approx(2e-3)
    # Recovered again, the registry of the first time is used.
    assert main(["recover", str(out), str(tmp_path / "again"), "--method", "norms", *QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["masks"] == "registry"


@pytest.mark.slow
def test_an_adapter_is_kept_apart_and_merged_without_losing_a_zero(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert main(["recover", str(pruned), str(out), "--method", "lora", *QUICK, "--json"]) == 0
    capsys.readouterr()
    same, before = tensors_of(out), tensors_of(pruned)
    assert all(bool((same[key] == before[key]).all()) for key in before)
    assert main(["merge", str(pruned), str(out / "adapter"), str(merged), "--verify", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = found["training"]
    assert facts["matrices"] == 35
    assert facts["merge_gap"] > 0
    assert facts["sparsity_of_plain_merge"] < 0.01 < facts["sparsity_before"]
    assert found["zeros"]["before"] == found["zeros"]["after"]
    assert main(["merge", str(pruned), str(tmp_path), str(tmp_path / "x")]) == 2
    assert "adapter_config.json is missing" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_recipe_prunes_recovers_and_evaluates_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {MODEL}\nout: out\ncalibration: {{samples: 4, length: 64}}\nprune: {{method: magnitude}}\n"
        f"recover: {{method: norms, steps: 4, batch: 2, length: 32, heldout: 4, lr: 0.002, text: {TEXT}}}\n"
        f"evaluate: {{text: {TEXT}, length: 64, windows: 4, baseline: false}}\n"
    )
    assert main(["run", str(recipe), "-q", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["skipped"] == []
    assert found["recover"]["zeros"]["after"] == found["prune"]["parameters"]["zeros"]
    assert found["evaluate"]["model"] == str(tmp_path / "out")
    assert (tmp_path / "out-pruned" / "config.json").is_file()
    assert main(["run", str(recipe), "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == ["prune", "recover", "evaluate"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "maskLora"], "There is no recovery 'maskLora'. Did you mean 'masklora'"),
        (["--method", "masklora", "--objective", "logit"], "There is no objective 'logit'. Did you mean 'logits'"),
        (["--set", "rang=3"], "There is no setting 'rang' in this recovery. Did you mean 'rank'"),
        (["--method", "masklora", "--set", "rank=0"], "rank = 0 must be at least 1"),
        (["--method", "masklora", "--set", "targets=*.query"], "The target '*.query' fits no matrix"),
        (["--method", "biases"], "0 parameters would be trained"),
        (["--steps", "3", "--minutes", "1"], "steps and minutes both say how long to train"),
        (["--text", "nowhere.txt"], "There is no text or file nowhere.txt"),
        (["--length", "100000"], "exceed the model's 512 positions"),
        (["--samples", "2"], "2 sequences are fewer than one batch of 4"),
        (["--heldout", "1000000"], "1000000 held-out ones and one batch of 4 need 1000004"),
        (["--method", "masklora", "--objective", "logits"], "name it with --dense"),
        (["--method", "lisa", "--set", "blocks=9"], "fewer than blocks=9"),
        (["--lr", "0"], "--lr must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_in_one_sentence_and_leaves_nothing(
    words: list[str], sentence: str, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [] if "--minutes" in words else list(QUICK)
    assert sentence in refused(capsys, str(pruned), str(tmp_path / "out"), *quick, *words)
    assert not list(tmp_path.iterdir())


def test_a_dense_model_is_refused_unless_that_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is nothing to preserve" in refused(capsys, str(MODEL), str(tmp_path / "out"), *QUICK)
    # Past that check, the next one speaks.
    said = refused(capsys, str(MODEL), str(tmp_path / "out"), "--allow-dense", "--method", "biases", *QUICK)
    assert "0 parameters would be trained" in said


def test_an_existing_out_and_an_empty_text_are_refused(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty.txt"
    out.mkdir()
    empty.write_text("")
    assert "exists" in refused(capsys, str(pruned), str(out), *QUICK)
    assert "is empty" in refused(capsys, str(pruned), str(tmp_path / "new"), *QUICK, "--text", str(empty))


def test_a_rate_that_diverges_stops_and_names_the_step(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK[:-3], "--lr", "1e30", "-q", "--method", "full"]
    said = refused(capsys, str(pruned), str(tmp_path / "out"), *words)
    assert "Training made nothing better (stopped: the " in said
    assert "not finite" in said
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.prunus" / "training" / "best.safetensors").is_file()  # the last good state


def test_too_little_memory_is_said_before_the_run(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunus.recovery.job.available", lambda: 100_000)
    said = refused(capsys, str(pruned), str(tmp_path / "out"), "--method", "masklora", *QUICK)
    assert "This recovery needs" in said
    assert "and 0.00 GB are free. Train fewer parameters" in said
    assert not list(tmp_path.iterdir())


def test_every_recovery_is_listed_with_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["methods"] if row["kind"] == "recovery"]
    assert [row["name"] for row in rows] == list(RECOVERIES)
    assert next(row for row in rows if row["name"] == "masklora")["defaults"]["masklora.rank"] == 16
