"""The command line as a user meets it: options, output, exit codes and refusals."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prunus
from prunus.cli import COMMANDS, main
from prunus.cli.options import RECIPE
from prunus.recipe import Recipe
from prunus.recipe_options import PLACES

RESULT: dict[str, Any] = {
    "model": "m",
    "out": "o",
    "method": "wanda",
    "pattern": "unstructured",
    "allocation": "uniform",
    "sparsity": {"wanted": 0.5, "reached": 0.5, "model": 0.4},
    "blocks": [{"name": "model.layers.0", "sparsity": 0.5, "wanted": 0.5, "error": float("nan"), "seconds": 1.0}],
    "seconds": {"total": 62.0, "prune": 61.0},
    "peak_rss_bytes": 812_345_678,
    "predicted_peak_bytes": 800_000_000,
    "calibration": {"source": "wikitext2", "samples": 4, "length": 8, "seed": 0, "sha256": "0", "bos": False},
    "versions": {"prunus": "0.1.0"},
    "warnings": ["one thing"],
    "size": {"dense_bytes": 10, "out_bytes": 10},
    "verify": {"max_difference": 0.0, "tolerance": 1e-4},
}

Calls = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk: two blocks, 16 wide, 32 token ids."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "dense"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration token ids `[4, 16]`, which need no tokenizer."""
    path = tmp_path_factory.mktemp("data") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 32, (4, 16)))
    return path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """In place of the engine: remembers how it was called, and talks where it should not."""
    calls: Calls = []

    def prune(recipe: Recipe, out: Path, **others: Any) -> dict[str, Any]:
        calls.append({"recipe": recipe, "out": out, **others})
        print("a library chatters on standard output")
        others["progress"].stage("prune", 1)
        others["progress"].advance("model.layers.0", error=0.5)
        return {**RESULT, "model": recipe.model, "out": str(out)}

    monkeypatch.setattr(import_module("prunus.engine"), "prune", prune)
    return calls


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- what options mean ---------------------------------------------------------------------------------------------


def test_options_reach_the_recipe_and_the_engine(engine: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "prune m o --method sparsegpt --pattern 2:4 --allocation owl --metric obs --update keep --set update.damp=0.1 "
        "--set allocation.span=0.05 --compat reference --calibration a.txt --samples 3 --length 9 --seed 7 --bos never "
        "--device cuda:1 --dtype bfloat16 --ignore *.q --ignore *.k --blocks h --trust-remote-code --restart "
        "--overwrite -q"
    )
    assert said(capsys, *words.split())[0] == 0
    (call,) = engine
    recipe = call["recipe"]
    assert (call["out"], call["restart"], call["overwrite"]) == (Path("o"), True, True)
    assert recipe.prune.model_dump(exclude_none=True) == {
        "method": "sparsegpt", "metric": "obs", "update": "keep", "pattern": "2:4", "sparsity": 0.5,
        "allocation": "owl", "settings": {"update.damp": 0.1, "allocation.span": 0.05}, "ignore": ["*.q", "*.k"],
        "blocks": "h", "compat": "reference", "portable": False,
    }  # fmt: skip
    assert recipe.calibration.model_dump() == {"source": "a.txt", "samples": 3, "length": 9, "seed": 7, "bos": "never"}
    assert (recipe.device, recipe.dtype, recipe.trust_remote_code) == ("cuda:1", "bfloat16", True)


def test_every_value_of_a_recipe_has_an_option() -> None:
    assert set(RECIPE) - {"recipe"} == set(PLACES) - {"model", "out"}


def test_the_python_function_takes_the_same_names(engine: Calls) -> None:
    assert set(RECIPE) == set(import_module("prunus.api").Options.__annotations__)
    prunus.prune(
        "m",
        Path("o"),
        sparsity=0.7,
        settings={"update.damp": 0.1},
        overwrite=True,
        progress=import_module("prunus.progress").Silent(),
    )
    assert engine[0]["recipe"].prune.sparsity == 0.7
    with pytest.raises(prunus.RecipeError, match="sparsity must be a number"):
        prunus.prune("m", "o", sparsity=2.0)


def test_options_that_are_not_given_leave_everything_to_the_recipe(
    engine: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: m\nout: o\nprune: {ignore: ['*.q'], settings: {update.damp: 0.5}}\ntrust_remote_code: true\n"
    )
    assert said(capsys, "prune", "--recipe", file)[0] == 0
    assert engine[0]["recipe"].prune.ignore == ["*.q"]
    assert engine[0]["recipe"].prune.settings == {"update.damp": 0.5}
    assert engine[0]["recipe"].trust_remote_code


def test_options_override_a_recipe_file(engine: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: m\nout: there\nprune: {sparsity: 0.3, method: ria}\n")
    assert said(capsys, "prune", "--recipe", file, "--sparsity", "0.6")[0] == 0
    assert engine[0]["recipe"].prune.sparsity == 0.6
    assert engine[0]["recipe"].prune.method == "ria"
    assert engine[0]["out"] == tmp_path / "there"


# --- what is printed -----------------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else_on_standard_output(
    engine: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, "prune", "m", "o", "--json")
    assert code == 0
    assert json.loads(out)["blocks"][0]["error"] is None  # NaN is no JSON
    assert out.count("\n") == 1
    assert "chatters" in err
    assert "prune 1/1" in err


def test_quiet_shows_no_progress(engine: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert "prune 1/1" not in said(capsys, "prune", "m", "o", "--quiet")[2]


def test_the_text_says_what_was_removed_what_it_buys_and_what_is_next(
    engine: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = said(capsys, "prune", "m", "my out", "-q")
    for words in ("50.00 %", "40.00 % of the whole model", "812 MB", "1:02", "no faster", "one thing"):
        assert words in " ".join(out.split())
    assert "prunus evaluate 'my out' --baseline m" in out
    assert max(map(len, out.splitlines())) <= 120


def test_no_speed_is_promised_where_blocks_differ() -> None:
    from prunus.report import buys

    block = RESULT["blocks"][0]
    exact = {**RESULT, "pattern": "2:4"}
    assert "GPUs execute" in " ".join(buys(exact).split())
    mixed = {**exact, "blocks": [{**block, "wanted": 0.25}, {**block, "wanted": 0.75}]}
    assert "GPUs execute" not in " ".join(buys(mixed).split())
    assert "not 2:4" in " ".join(buys(mixed).split())
    unknown = {**exact, "blocks": [{"name": "a", "parameters": 4, "sparsity": None}]}
    assert "GPUs execute" not in " ".join(buys(unknown).split())


def test_text_that_nothing_looked_at_is_not_called_calibration() -> None:
    from prunus.report import prune_text

    assert "4 x 8 tokens" in prune_text(RESULT)
    unused = {**RESULT, "calibration": {**RESULT["calibration"], "used": False}}
    assert "4 x 8 tokens" not in prune_text(unused)


def test_a_model_without_a_language_head_is_not_sent_to_perplexity() -> None:
    from prunus.report import prune_text

    assert "prunus evaluate" in prune_text({**RESULT, "architecture": "GPT2LMHeadModel"})
    assert "prunus evaluate" not in prune_text({**RESULT, "architecture": "CLIPModel"})


def test_the_card_loads_by_the_right_class_and_repeats_every_setting() -> None:
    from prunus.card import model_card

    assert "AutoModelForCausalLM.from_pretrained('o')" in model_card({**RESULT, "architecture": "LlamaForCausalLM"})
    card = model_card({**RESULT, "architecture": "CLIPModel"})
    assert "CausalLM" not in card
    assert "CLIPModel.from_pretrained('o')" in card
    recipe = Recipe(model="m", device="cuda:1", dtype="bfloat16", calibration={"bos": "never"})  # type: ignore[arg-type]
    for words in ("--device cuda:1", "--dtype bfloat16", "--bos never"):
        assert words in model_card(RESULT, recipe.resolved())
        assert words not in model_card(RESULT, Recipe(model="m").resolved())


def test_only_the_first_process_prints(
    engine: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert said(capsys, "prune", "m", "o", "--json")[1] == ""


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_fits_the_terminal_and_ends_with_examples(
    command: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = said(capsys, *[word for word in (command, "--help") if word])
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    examples = out.partition("Examples:\n")[2].strip().splitlines()
    assert examples
    assert all(line.strip().startswith(f"prunus {command}") for line in examples)


@pytest.mark.parametrize("name", RECIPE)
def test_every_option_is_explained_and_ranges_and_defaults_are_given(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = said(capsys, "prune", "--help")
    flag = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
    assert f"  {flag} " in out


def test_no_word_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys)
    assert (code, err) == (0, "")
    assert "prunus plan" in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version")[1] == f"prunus {prunus.__version__}\n"


def test_methods_come_from_the_registries(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(said(capsys, "methods", "--json")[1])["methods"]
    _, out, _ = said(capsys, "methods")
    for row in rows:
        assert {"name", "kind", "paper", "needs"} <= row.keys()
        assert row["name"] in out


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert "prune" in json.loads(said(capsys, "schema")[1])["properties"]


# --- the whole way, on a tiny model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model pruned by the real command in the 2:4 pattern."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    assert main(["prune", str(model), str(out), "--calibration", str(ids), "--pattern", "2:4", "-q"]) == 0
    return out


def test_inspect_sees_what_prune_did(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "inspect", pruned, "--json")[1])
    assert found["pruned_share"] == 0.5
    assert all("2:4" in block["patterns"] for block in found["blocks"])
    _, out, _ = said(capsys, "inspect", pruned, "--matrices")
    assert out.count("2:4") >= 14
    assert "made by" in out


def test_a_plan_reads_no_weights_and_agrees_with_the_run(
    model: Path, ids: Path, pruned: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    headless = tmp_path / "headers only"
    shutil.copytree(model, headless)
    file = headless / "model.safetensors"
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little") + 8
    # The same header, and no number behind it.
    file.write_bytes(file.read_bytes()[:header])
    os.truncate(file, size)
    words = [headless, "--calibration", ids, "--pattern", "2:4", "--json"]
    found = json.loads(said(capsys, "plan", *words)[1])
    done = json.loads((pruned / "prunus.json").read_text())["result"]
    assert [block["sparsity"] for block in found["blocks"]] == [block["wanted"] for block in done["blocks"]]
    assert found["sites"]["count"] == done["sites"]
    assert sum(found["memory"]["terms"].values()) == found["memory"]["total"]
    assert found["calibration"]["samples"] == 4
    assert json.loads(said(capsys, "prune", *words, "--dry-run")[1])["blocks"] == found["blocks"]


def test_a_plan_says_when_the_budget_needs_a_pass(model: Path, ids: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "plan", model, "--allocation", "owl", "--calibration", ids)
    assert "decided by a first pass over the calibration text" in " ".join(out.split())


def test_a_plan_counts_every_parameter_once(model: Path, ids: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "plan", model, "--ignore", "*.q_proj", "--calibration", ids, "--json")[1])
    left = found["left_alone"]
    total = LlamaForCausalLM.from_pretrained(model).num_parameters()
    assert found["sites"]["parameters"] + left["outside"] + left["inside"] == found["parameters"] == total
    assert left["ignored"] == [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]


def test_run_skips_what_is_done(
    model: Path,
    ids: Path,
    pruned: Path,
    engine: Calls,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: Calls = []

    def evaluate(folder: str, **others: Any) -> dict[str, Any]:
        measured.append({"model": folder, **others})
        facts = {"perplexity": 2.0, "seconds": 1.0, "windows": 1, "length": 8, "tokens": 8, "text": "t"}
        return {"model": folder, **facts, "baseline": {"model": others["baseline"], **facts}}

    def run(text: str) -> dict[str, Any]:
        (tmp_path / "r.yaml").write_text(text)
        return json.loads(said(capsys, "run", tmp_path / "r.yaml", "--json")[1])

    monkeypatch.setattr(import_module("prunus.evaluation.perplexity"), "evaluate", evaluate)
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    # `pruned` was made by `prunus prune` with these options.
    text = f'model: {model}\nout: out\ncalibration: {{source: {ids}}}\nprune: {{pattern: "2:4"}}\n'
    assert run(text) == {
        "prune": json.loads((out / "prunus.json").read_text())["result"],
        "recover": None,
        "evaluate": None,
        "skipped": ["prune"],
    }
    first, second = run(text + "evaluate: {length: 8}"), run(text + "evaluate: {length: 8}")
    assert (first["skipped"], second["skipped"]) == (["prune"], ["prune", "evaluate"])
    assert first["evaluate"] == second["evaluate"] == json.loads((out / "evaluation.json").read_text())["result"]
    assert measured[0]["baseline"] == str(model)
    book = tmp_path / "book.txt"
    book.write_text("one text")
    assert run(text + f"evaluate: {{text: {book}}}")["skipped"] == ["prune"]
    assert run(text + f"evaluate: {{text: {book}}}")["skipped"] == ["prune", "evaluate"]
    book.write_text("another text")
    assert run(text + f"evaluate: {{text: {book}}}")["skipped"] == ["prune"]
    # Another way of judging is only judged anew; another way of pruning is another checkpoint.
    assert run(text + "evaluate: {length: 16}")["skipped"] == ["prune"]
    assert not engine
    assert run(text.replace("2:4", "1:4"))["skipped"] == []
    assert engine[0]["out"] == out


def test_run_does_not_skip_when_an_input_has_changed_under_its_name(
    model: Path, ids: Path, engine: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from prunus.job import identity

    dense, tokens, ratios = tmp_path / "dense", tmp_path / "ids.npy", tmp_path / "ratios.yaml"
    shutil.copytree(model, dense)
    shutil.copy(ids, tokens)
    ratios.write_text('"*": 0.5')
    recipe = Recipe.model_validate(
        {
            "model": str(dense),
            "out": str(tmp_path / "out"),
            "calibration": {"source": str(tokens)},
            "prune": {"allocation": "manual", "settings": {"allocation.file": str(ratios)}},
        }
    )
    (tmp_path / "out").mkdir()
    record = {"recipe": recipe.resolved(), "result": RESULT, "fingerprint": identity(recipe, dense)}
    (tmp_path / "out" / "prunus.json").write_text(json.dumps(record))
    skipped = lambda: prunus.run(recipe)["skipped"]  # noqa: E731
    assert skipped() == ["prune"]

    before = ratios.read_text()
    ratios.write_text('"*": 0.4')
    assert skipped() == []
    ratios.write_text(before)
    assert skipped() == ["prune"]

    np.save(tokens, np.load(ids)[:, ::-1])
    assert skipped() == []
    shutil.copy(ids, tokens)
    assert skipped() == ["prune"]

    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert skipped() == []
    assert len(engine) == 3


# --- refusals ------------------------------------------------------------------------------------------------------

Spoil = Callable[[Path], object]


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _index(shard: str) -> Spoil:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))

    return write


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _remote(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}, "architectures": ["Unheard"]}
    (folder / "config.json").write_text(json.dumps(config))


def _nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BAD_MODELS: list[tuple[str, Spoil, list[str]]] = [
    ("no config", lambda folder: (folder / "config.json").unlink(), ["config.json", "folder"]),
    ("truncated", _cut, ["model.safetensors", "truncated"]),
    ("missing shard", _index("model-00009.safetensors"), ["model-00009.safetensors", "missing"]),
    ("shard outside", _index("../elsewhere.safetensors"), ["elsewhere.safetensors", "outside"]),
    ("pickles only", _pickle, ["pytorch_model.bin", "pickle"]),
    ("remote code", _remote, ["code", "--trust-remote-code"]),
    ("NaN", _nan, ["model.layers.1.mlp.up_proj", "NaN"]),
]


def refused(capsys: pytest.CaptureFixture[str], out: Path, words: list[Any], expected: list[str]) -> None:
    """The command ends with 2 and one sentence that has these words; OUT does not appear."""
    code, printed, err = said(capsys, *words)
    sentences = [line for line in err.splitlines() if line.startswith("prunus: ")]
    assert code == 2, err
    assert printed == ""
    assert "Traceback" not in err
    assert len(sentences) == 1, err
    assert all(word in sentences[0] for word in expected), sentences
    assert not out.exists()


@pytest.mark.parametrize(("spoil", "expected"), [row[1:] for row in BAD_MODELS], ids=[row[0] for row in BAD_MODELS])
def test_a_bad_model_is_refused(
    spoil: Spoil, expected: list[str], model: Path, ids: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(model, bad)
    spoil(bad)
    refused(capsys, tmp_path / "out", ["prune", bad, tmp_path / "out", "--calibration", ids, "-q"], expected)


BAD_OPTIONS: list[tuple[str, list[str]]] = [
    ("--sparsity -0.1", ["--sparsity", "at least 0", "-0.1"]),
    ("--sparsity 1.0", ["--sparsity", "below 1", "1.0"]),
    ("--sparsity NaN", ["--sparsity", "number", "NaN"]),
    ("--sparsity half", ["--sparsity", "number", "half"]),
    ("--pattern 4:2", ["4:2", "2:4"]),
    ("--pattern 0:4", ["0:4", "at least 1"]),
    ("--pattern 2:3", ["model.layers.0.self_attn.q_proj", "16", "3", "ignore"]),
    ("--pattern 2to4", ["2to4", "unstructured", "2:4"]),
    ("--pattern 2:4 --sparsity 0.7", ["2:4", "0.7", "contradicts"]),
    ("--method wands", ["wands", "Did you mean 'wanda'"]),
    ("--metric magnitud", ["magnitud", "'magnitude'"]),
    ("--update obss", ["obss", "'obs'"]),
    ("--allocation ow", ["'ow'", "'owl'"]),
    ("--set update.damps=1 --method sparsegpt", ["damps", "'damp'"]),
    ("--set damp", ["--set", "part.field=value"]),
    ("--ignore *.nothing", ["--ignore", "*.nothing", "matches no matrix"]),
    ("--blocks model.layer", ["--blocks", "model.layer", "'model.layers'"]),
    ("--calibration nowhere.txt", ["nowhere.txt"]),
    ("--calibration EMPTY", ["empty"]),
    ("--calibration BINARY", ["BINARY", "text"]),
    ("--calibration LARGE_IDS", ["LARGE_IDS", "32"]),
    ("--device tpu", ["--device", "cpu", "cuda"]),
    ("--device mps", ["--device", "cpu", "cuda"]),
    ("--samples 0", ["--samples", "at least 1"]),
    ("--spasity 0.5", ["--spasity", "--sparsity", "prunus prune --help"]),
    ("--recipe missing.yaml", ["missing.yaml", "no recipe"]),
    ("--recipe UNKNOWN_KEY", ["sparsty", "Did you mean 'sparsity'"]),
    ("--recipe WRONG_TYPE", ["calibration.samples", "whole number", "'many'"]),
]


@pytest.mark.parametrize(("words", "expected"), BAD_OPTIONS, ids=[words for words, _ in BAD_OPTIONS])
def test_a_bad_option_is_refused(
    words: str, expected: list[str], model: Path, ids: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = {name: tmp_path / name for name in ("EMPTY", "BINARY", "UNKNOWN_KEY", "WRONG_TYPE")}
    files["EMPTY"].write_text("")
    files["BINARY"].write_bytes(bytes(range(256)))
    files["UNKNOWN_KEY"].write_text("prune: {sparsty: 0.5}")
    files["WRONG_TYPE"].write_text("calibration: {samples: many}")
    files["LARGE_IDS"] = tmp_path / "LARGE_IDS.npy"
    np.save(files["LARGE_IDS"], np.full((2, 8), 32))
    given = [files.get(word, word) for word in words.split()]
    given += [] if "--calibration" in given else ["--calibration", ids]
    refused(capsys, tmp_path / "out", ["prune", model, tmp_path / "out", "-q", *given], expected)


def test_a_plan_refuses_what_the_run_would(
    model: Path, ids: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    rest = ["--calibration", ids]
    refused(capsys, out, ["plan", model, out, "--pattern", "2:3", *rest], ["model.layers.0.self_attn.q_proj", "3"])
    refused(capsys, out, ["plan", model, model / "out", *rest], ["OUT", "inside"])
    refused(capsys, out, ["plan", model, out, "--method", "wands", *rest], ["wands"])
    refused(capsys, out, ["plan", model, out, "--calibration", "nowhere.txt"], ["nowhere.txt"])
    refused(capsys, out, ["plan", model, out, "--calibration", "c4", "--length", "65"], ["65", "64"])
    refused(capsys, out, ["plan", model, out, "--calibration", "c4"], ["tokenizer"])
    # Data-free methods are verified with a few tokens all the same.
    refused(capsys, out, ["plan", model, out, "--method", "magnitude", "--calibration", "nowhere.txt"], ["nowhere.txt"])


def test_a_plan_writes_nothing_and_notes_what_exists(
    model: Path, ids: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert said(capsys, "plan", model, tmp_path / "a" / "b" / "out", "--calibration", ids)[0] == 0
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    words = ["plan", model, tmp_path / "out", "--calibration", ids]
    assert "--overwrite" in json.loads(said(capsys, *words, "--json")[1])["notes"][0]
    assert "Note: OUT" in said(capsys, *words)[1]


def test_a_bad_place_is_refused(model: Path, ids: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").write_text("mine")
    rest = ["--calibration", ids, "-q"]
    nowhere = tmp_path / "never"
    refused(capsys, model / "out", ["prune", model, model / "out", *rest], ["OUT", "inside"])
    refused(capsys, nowhere, ["prune", model, model, *rest], ["OUT", "model"])
    refused(capsys, nowhere, ["prune", model, tmp_path / "file", *rest], ["file"])
    refused(capsys, nowhere, ["prune", model, tmp_path / "old", *rest], ["exists", "--overwrite"])
    refused(capsys, nowhere, ["prune", model, tmp_path / "file" / "out", *rest], ["cannot be written"])
    assert (tmp_path / "old" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prune"], ["MODEL", "missing"]),
        (["prune", "m"], ["OUT", "missing"]),
        (["prune", "a", "b", "c"], ["unexpected", "c"]),
        (["prume"], ["prume", "Did you mean 'prune'?"]),
        (["evaluate"], ["MODEL"]),
        (["evaluate", "m", "--length", "long"], ["--length", "whole number"]),
        (["evaluate", "m", "--windows", "0"], ["--windows", "at least 1"]),
        (["inspect", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["run", "none.yaml"], ["none.yaml", "no recipe"]),
    ],
    ids=str,
)
def test_a_command_that_cannot_be_meant_is_refused(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refused(capsys, tmp_path / "out", words, expected)


def test_a_fault_of_ours_is_told_as_one(
    engine: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(import_module("prunus.engine"), "prune", fail)
    code, out, err = said(capsys, "prune", "m", "o", "--json")
    assert (code, out) == (1, "")
    assert "ZeroDivisionError: oops" in err
    assert "fault of prunus" in err


# --- as a process --------------------------------------------------------------------------------------------------


def _process(*words: str, **others: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prunus", *words] if words[0] != "-c" else [sys.executable, *words]
    # Jobs that a shell starts in the background ignore Ctrl-C, and so would their children.
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen, **others
    )


def test_help_comes_at_once_and_without_heavy_imports() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out, _ = _process("--help").communicate(timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Examples" in out
    # Processor time: the wall clock of a busy machine says nothing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    code = "import sys, prunus.cli; prunus.cli.main(['--help']); print(*sys.modules, file=sys.stderr)"
    loaded = set(_process("-c", code).communicate(timeout=60)[1].split())
    assert not loaded & {"torch", "transformers", "numpy", "rich", "pydantic", "yaml"}


WAITING = """
import sys, time, types
fake = types.ModuleType("prunus.engine")
def prune(recipe, out, progress, **others):
    progress.stage("prune", 3)
    print("begun", file=sys.stderr, flush=True)
    time.sleep(60)
fake.prune = prune
sys.modules["prunus.engine"] = fake
from prunus.cli import main
sys.exit(main(["prune", "m", "o", "--json"]))
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=lambda kind: kind.name)
def test_an_interruption_says_how_to_go_on(kind: signal.Signals) -> None:
    process = _process("-c", WAITING)
    assert process.stderr is not None
    while "begun" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(kind)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "same command again continues" in err
    assert "Traceback" not in err


IMPORTING = """
import os, runpy, signal, sys
name = sys.argv[1]
class Interrupted:
    def find_spec(self, wanted, *_):
        if wanted == name:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
sys.argv = ["prunus", "methods"]
runpy.run_module("prunus", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["typer", "prunus.methods.catalogue"])
def test_an_interruption_while_modules_are_imported_gives_no_traceback(module: str) -> None:
    process = _process("-c", IMPORTING, module)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "prunus: Interrupted.")


def test_a_reader_that_goes_away_causes_no_noise() -> None:
    with _process("schema") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (0, 1)


def test_every_public_name_is_there_whatever_was_imported_before() -> None:
    code = (
        "import prunus, prunus.engine, prunus.planning, prunus.inspection, prunus.methods, prunus.cli\n"
        "assert all(callable(getattr(prunus, name)) for name in prunus.__all__ if name != '__version__')\n"
        "assert set(dir(prunus)) == set(prunus.__all__)\n"
    )
    assert _process("-c", code).communicate(timeout=120)[1] == ""
