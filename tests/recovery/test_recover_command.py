"""`prunus recover` and `prunus merge` as a user meets them: what they print, and what they refuse."""

from __future__ import annotations

import gzip
import json
import math
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MODEL, SMALL, TEXT, is_site, job_of, run, tensors_of
from safetensors.torch import load_file, save_file

import prunus
from prunus.cli import main
from prunus.errors import CalibrationError, RecipeError
from prunus.models.gguf import SOURCE
from prunus.recipe import RecoverPart
from prunus.recovery import RECOVERIES
from prunus.recovery.card import recovery_card
from prunus.recovery.report import recover_text
from prunus.recovery.run import collapse
from prunus.recovery.samples import place, written
from prunus.recovery.student import Student, loaded
from prunus.recovery.training import Loop
from prunus.verify import compare
from shaped import cut

ROOT = Path(__file__).parent.parent.parent
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
    card = (out / "README.md").read_text()
    assert 'PeftModel.from_pretrained(model, "out/adapter")' in card
    assert "PeftModel" not in (merged / "README.md").read_text()


@pytest.mark.usefixtures("verified_here")
def test_a_merge_does_not_forget_unfinished_work(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    left = job_of(pruned, tmp_path / "left", "lora")
    with loaded(left.stream.weights):
        student = Student(left.model, left.blocks, left.masks, left.stream.weights)
        left.recovery.attach(student)
        left.recovery.parts[0].save(student, adapter, "half")
    (left.work.training / "log.jsonl").write_text("hours of work")
    left.work.close()
    words = ["merge", str(pruned), str(adapter), str(tmp_path / "left"), "-q"]
    assert main(words) == 2
    assert "holds an unfinished run of something else" in " ".join(capsys.readouterr().err.split())
    assert (left.work.training / "log.jsonl").is_file()
    assert main([*words, "--restart"]) == 0


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


def test_a_place_that_is_taken_is_seen_before_anything_is_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(f"model: {MODEL}\nout: out\nprune: {{method: magnitude}}\nrecover: {{method: norms}}\n")
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert main(["run", str(recipe), "-q"]) == 2
    assert f"OUT {out} exists" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


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
        (["--method", "perp", "--set", "head.tied=maybe"], "Input should be 'skip', 'untie' or 'both'"),
        (["--max-ppl-ratio", "2"], "nothing says which that is; name it with --dense"),
        (["--max-ppl-ratio", "1"], "--max-ppl-ratio"),
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


def with_zeros(folder: Path, share: float) -> Path:
    """The dense model with zeros by accident, spread over its matrices."""
    shutil.copytree(MODEL, folder)
    tensors, random = load_file(MODEL / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if is_site(name):
            tensor[torch.rand(tensor.shape, generator=random) < share] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_zeros_by_accident_do_not_make_a_model_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, tenth = with_zeros(tmp_path / "few", 0.002), with_zeros(tmp_path / "tenth", 0.1)
    # Said before the dense model is asked for, which the default method needs.
    said = refused(capsys, str(few), str(tmp_path / "out"), *QUICK)
    assert "This model is dense: at most 0." in said
    assert "less than 1%" in said
    dense = job_of(few, tmp_path / "out", "masklora", allow_dense=True)
    assert dense.masks.removed == 0
    assert dense.warnings == ["The model is dense: there are no zeros to keep."]
    assert job_of(tenth, tmp_path / "other", "masklora").masks.removed > 10_000
    # Fewer blocks: not dense, and what is zero by accident may grow.
    (few / "prunus.json").write_text(json.dumps({"result": {"sparsity": {"reached": 0.2}, "shapes": {}}}))
    shorter = job_of(few, tmp_path / "cut", "masklora")
    assert (shorter.masks.removed, shorter.warnings) == (0, [])
    (few / "prunus.json").write_text(json.dumps({"result": {"sparsity": {"reached": 0.002}}}))
    assert job_of(few, tmp_path / "zeros", "masklora").masks.removed > 0
    # In four bits a tenth of all weights is zero without any pruning.
    (tenth / SOURCE).write_text("{}")
    assert "less than 30%" in refused(capsys, str(tenth), str(tmp_path / "third"), *QUICK)


def test_a_matrix_with_zeros_by_accident_freezes_only_its_own(tmp_path: Path) -> None:
    folder = with_zeros(tmp_path / "few", 0.002)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][:4] = 0.0  # of 172 rows
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    job = job_of(folder, tmp_path / "out", "masklora")
    assert {site for site, share in job.masks.shares.items() if share} == {name}
    assert job.masks.removed >= 4 * 64
    assert "34 of 35 matrices" in job.warnings[0] and "pass for accidents" in job.warnings[0]


def test_text_of_the_dense_model_is_cached_for_a_device_and_a_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    cpu, gpu, part = torch.device("cpu"), torch.device("cuda"), RecoverPart(samples=2, heldout=1, length=8)
    whole = written(MODEL, part, cpu, "auto", False)
    assert written(MODEL, part, cpu, "float32", False) == whole  # what auto is there
    short = written(MODEL, part, cpu, "bfloat16", False)
    assert len({whole, short, *(place(MODEL, 3, 8, part.seed, gpu, dtype) for dtype in ("float32", "bfloat16"))}) == 4
    assert all(np.load(file).shape == (3, 8) for file in (whole, short))


@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("method", ["reconstruct", "lora", pytest.param("full", marks=pytest.mark.thorough)])
def test_what_prunus_alone_loads_is_recovered_in_its_own_shapes(method: str, tmp_path: Path) -> None:
    folder = cut(MODEL, tmp_path / "unequal", (4, 3, 4, 2, 4), (172, 100, 172, 60, 90))
    (folder / "prunus.json").write_text(json.dumps({"result": {"loads": "prunus", "shapes": {}, "sparsity": 0.2}}))
    words = {**SMALL, "method": method, "dense": str(MODEL)}
    if method == "reconstruct":
        words = {key: value for key, value in words.items() if key not in ("steps", "lr")} | {"samples": 64}
    out = tmp_path / "out"
    found = prunus.recover(str(folder), out, **words)
    assert found["loads"] == "prunus"
    assert "none to keep" in recover_text(found)
    assert found["loss"]["after"] < found["loss"]["before"]
    before, after = tensors_of(folder), tensors_of(out)
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    ids = torch.arange(1, 17).view(1, 16)
    assert not torch.equal(prunus.load(out)(ids).logits, prunus.load(folder)(ids).logits)
    assert 'prunus.load("out")' in (out / "README.md").read_text()


@pytest.mark.usefixtures("verified_here")
def test_factors_of_low_rank_are_reconstructed_beside_the_whole_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunus.engine.verify", compare)
    svd, out = tmp_path / "svd", tmp_path / "out"
    prunus.prune(MODEL, svd, method="svd", sparsity=0.4, calibration=str(TEXT), samples=4, length=32)
    words = {"samples": 12, "length": 32, "heldout": 4, "text": str(TEXT)}
    found = prunus.recover(svd, out, **words)
    assert found["loads"] == "code"
    assert found["loss"]["after"] < found["loss"]["before"] - 0.1
    assert tensors_of(svd).keys() == tensors_of(out).keys()
    # The factors, and nothing but them, are what was trained.
    assert found["trainable"] == sum(value.numel() for name, value in tensors_of(svd).items() if is_site(name))


def test_the_table_of_texts_has_every_run_with_the_share_of_the_gap(tmp_path: Path) -> None:
    table, file = runpy.run_path(str(ROOT / "scripts" / "recovery_table.py")), tmp_path / "rows.jsonl"
    row = {"case": "wanda 50", "seconds": {"cpu": 61.4}, "length": 512, "sequences": 64, "trainable": 5}
    rows = [
        {"case": "dense", "recovery": "none", "perplexity": {"a": 20.0, "b": 30.0}},
        {"case": "wanda 50", "recovery": "none", "perplexity": {"a": 50.0, "b": 70.0}},
        {**row, "recovery": "reconstruct", "facts": {"steps": None}, "perplexity": {"a": 35.0, "b": 40.0}},
        {**row, "recovery": "perp", "facts": {"steps": 10}, "asked": {"batch": 4}, "perplexity": {"a": 65, "b": 70}},
        {"case": "wanda 50", "recovery": "spp", "refused": "too much memory"},
        {"case": "wanda 70", "recovery": "none", "perplexity": {"a": 900.0}},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = table["judged"](file).splitlines()
    assert lines[2:] == [
        "| not at all | | | | 20.00 | 30.00 |",
        "| wanda 50 |  |  |  | 50.00 | 70.00 |",
        "| wanda 50 | `reconstruct` | 32,768 | 61 | 35.00 (50 %) | 40.00 (75 %) |",
        "| wanda 50 | `perp` | 20,480 | 61 | 65.00 (-50 %) | 70.00 (0 %) |",
        "| wanda 50 | `spp` |  |  | too much memory | too much memory |",
        "| wanda 70 |  |  |  | 900.00 |  |",
    ]


@pytest.mark.usefixtures("verified_here")
def test_a_limit_on_the_perplexity_publishes_nothing_over_it_and_goes_on_under_a_higher_one(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["recover", str(pruned), str(out), "--method", "norms", "--dense", str(MODEL), *QUICK]
    assert main([*words, "--max-ppl-ratio", "1.01"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Quality fell off a cliff" in said
    assert "It writes: “Once upon a time" in said
    assert "Train longer" in said
    assert not out.exists()
    log = (tmp_path / ".out.prunus" / "training" / "log.jsonl").read_text()
    assert main([*words, "--max-ppl-ratio", "1e6"]) == 0
    said = capsys.readouterr().out
    assert "times the dense model's" in said
    assert "it writes: “Once upon a time" in said
    # The steps of the first call were not done again, but for those behind its last saved state.
    assert (out / "recovery.jsonl").read_text().splitlines()[:4] == log.splitlines()[:4]
    assert 1.01 < json.loads((out / "prunus.json").read_text())["result"]["guard"]["ratio"] < 1e6


def test_without_a_limit_a_collapse_is_told() -> None:
    assert collapse(6.0, 512) is None
    assert "--max-ppl-ratio would refuse" in str(collapse(6.3, 512))  # ln 512 = 6.24


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
    assert re.search(r"not finite after step \d|the loss of step \d was not finite", said)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.prunus" / "training" / "best.safetensors").is_file()  # the last good state


def test_a_rate_that_is_only_too_large_is_refused_with_what_to_do(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK[:-3], "--lr", "30", "-q", "--method", "norms"]
    said = refused(capsys, str(pruned), str(tmp_path / "out"), *words)
    assert "Training made nothing better (the held-out loss never fell below that of the beginning" in said
    assert "Give a smaller --lr (or --lr auto)" in said
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_keeps_the_last_good_state_and_names_the_step(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, loss, calls = job_of(pruned, tmp_path / "out", "norms"), Loop.compute_loss, []

    def breaking(self, *args, **kwargs):
        calls.append(1)
        return loss(self, *args, **kwargs) * (math.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(Loop, "compute_loss", breaking)
    outcome = run(job)
    assert "Stopped: the loss of step 4 was not finite." in job.warnings
    assert outcome.facts["best_step"] == 3
    assert outcome.after < outcome.before
    best = load_file(job.work.training / "best.safetensors")
    written = tensors_of(job.work.checkpoint)
    assert all(torch.equal(written[name], value) for name, value in best.items())


@pytest.mark.parametrize(
    ("what", "words"), [("dense", "dense.weights changed"), ("text", "heldout changed"), ("nothing", "")]
)
def test_an_unfinished_run_goes_on_only_with_the_same_dense_model_and_held_out_text(
    what: str, words: str, pruned: Path, tmp_path: Path
) -> None:
    dense, text = tmp_path / "dense", tmp_path / "text.txt"
    shutil.copytree(MODEL, dense)
    text.write_text(TEXT.read_text()[:20_000])
    asked = {"dense": str(dense), "text": str(text), "objective": "logits", "samples": 8}
    job_of(pruned, tmp_path / "out", "norms", **asked).work.close()
    if what == "dense":
        save_file(load_file(MODEL / "model.safetensors"), dense / "model.safetensors", metadata={"format": "pt"})
    elif what == "text":
        text.write_text(TEXT.read_text()[:19_000])  # the sequences that are learnt from stay
    if words:
        with pytest.raises(RecipeError, match=words):
            job_of(pruned, tmp_path / "out", "norms", **asked)
    else:
        job_of(pruned, tmp_path / "out", "norms", **asked)


def test_instructions_may_be_gzipped(pruned: Path, tmp_path: Path) -> None:
    plain, packed, broken = (tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.gz"))
    rows = [{"prompt": f"Tell of {n}\u2028 cats.", "response": f"{n} cats sat on a mat."} for n in range(12)]
    plain.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    broken.write_bytes(packed.read_bytes()[:40])
    found = [
        job_of(pruned, tmp_path / name, "norms", data="instructions", text=str(path)).lessons
        for name, path in (("one", plain), ("two", packed))
    ]
    assert torch.equal(found[0].train.ids, found[1].train.ids)
    assert (found[0].train.labels == -100).any()
    with pytest.raises(CalibrationError, match="can be read whole"):
        job_of(pruned, tmp_path / "b", "norms", data="instructions", text=str(broken))


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


@pytest.mark.parametrize("apart", [None, "adapter"])
def test_the_card_of_what_needs_our_modelling_file_says_so(apart: str | None) -> None:
    result = {
        "out": "/somewhere/out", "method": "masklora", "objective": "text", "trainable": 10, "trainable_share": 0.1,
        "loss": {"before": 2.0, "after": 1.0}, "zeros": {"after": 0}, "training": {"apart": apart},
        "text": {"source": "text.txt", "rows": 1, "length": 8}, "versions": {"prunus": "0"},
    }  # fmt: skip
    record = {"result": {"method": "svd"}}
    assert recovery_card({**result, "loads": "code"}, record).count('("out", trust_remote_code=True)') == 2
    stock, own = (recovery_card({**result, "loads": loads}, record) for loads in ("transformers", "prunus"))
    assert "trust_remote_code" not in stock + own
    assert 'model = prunus.load("out")' in own and "AutoModel" not in own
