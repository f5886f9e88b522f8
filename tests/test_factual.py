"""`prunus score`: TruthfulQA and FACTOR from local files, plain and by DoLa."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunus.cli import main
from prunus.errors import CalibrationError, PrunusError, RecipeError
from prunus.evaluation.factual import judge, metrics
from prunus.evaluation.factual_data import Item, read_items

MODEL = Path(__file__).parent / "assets" / "stories260k"
TRUTHFUL = {
    "question": "What did Lily like?",
    "mc1_targets": {"choices": ["She liked to play.", "She liked the moon."], "labels": [1, 0]},
    "mc2_targets": {"choices": ["She liked to play.", "A ball.", "She liked the moon."], "labels": [1, 1, 0]},
}
FACTOR = {
    "full_prefix": "Once upon a time there was a little girl. ",
    "completion": "She liked to play.",
    **{f"contradiction_{number}": f"The {word} was a king." for number, word in enumerate(("tree", "cat", "cup"))},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "truthfulqa_mc.validation.jsonl").write_text(json.dumps(TRUTHFUL) + "\n", "utf-8")
    (tmp_path / "factor_news.jsonl.gz").write_bytes(gzip.compress((json.dumps(FACTOR) + "\n").encode()))
    return tmp_path


def test_the_csv_of_truthfulqa_gives_the_same_kind_of_item(tmp_path: Path) -> None:
    (tmp_path / "TruthfulQA.csv").write_text(
        "Question,Best Answer,Correct Answers,Incorrect Answers\nWhy?,Because,Because; So it is.,Never; No one\n",
        "utf-8",
    )
    (item,) = read_items("truthfulqa", tmp_path, preamble="")
    assert item.prefix == "Q: Why?\nA:"
    assert item.true == (" Because.", " So it is.") and item.false == (" Never.", " No one.")
    assert item.single == (" Because.", (" Never.", " No one."))


def test_metrics_are_their_definitions() -> None:
    item = Item("", ("a", "b"), ("c",), ("a", ("c",)))
    values = {"a": -1.0, "b": -3.0, "c": -2.0}
    found = metrics(item, values)
    mass = {name: math.exp(value) for name, value in values.items()}
    assert found == {"mc1": 1.0, "mc2": pytest.approx((mass["a"] + mass["b"]) / sum(mass.values())), "mc3": 0.5}
    assert metrics(Item("", ("a",), ("b", "c")), {"a": 1.0, "b": 1.0, "c": 0.0}) == {"accuracy": 1.0}
    assert metrics(item, {"a": -2000.0, "b": -2001.0, "c": -1.0})["mc2"] < 1e-9


def test_plain_scores_are_the_models_own_log_likelihoods(data: Path) -> None:
    result = judge(MODEL, "truthfulqa", data, preamble="")
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    values = {}
    for text in (" She liked to play.", " A ball.", " She liked the moon."):
        ids = tokenizer(f"Q: {TRUTHFUL['question']}\nA:{text}", return_tensors="pt")["input_ids"]
        before = len(tokenizer(f"Q: {TRUTHFUL['question']}\nA:")["input_ids"])
        log_p = model(ids).logits[0].detach().log_softmax(-1)
        values[text] = sum(float(log_p[place - 1, ids[0, place]]) for place in range(before, ids.shape[1]))
    mass = {text: math.exp(value) for text, value in values.items()}
    wanted = 1 - mass[" She liked the moon."] / sum(mass.values())
    assert result["plain"]["mc2"]["mean"] == pytest.approx(wanted, abs=1e-4)
    assert sum(result["chosen"].values()) > 0 and result["dola"]["relative_top"] == 0


def test_six_answered_questions_stand_before_those_of_truthfulqa_unless_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (published,) = read_items("truthfulqa", data)
    assert published.prefix.count("Q: ") == 7 and published.prefix.count("\nA: ") == 6
    assert published.prefix.startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert published.prefix.endswith(f"Barcelona, Spain.\n\nQ: {TRUTHFUL['question']}\nA:")
    assert read_items("factor_news", data)[0].prefix == FACTOR["full_prefix"].strip()
    words = ["score", str(MODEL), "--task", "truthfulqa", "--task-data", str(data), "--json", "-q"]
    (tmp_path / "own.txt").write_text("Q: Who?\nA: Lily.\n", "utf-8")
    found = {}
    for more in ([], ["--preamble", "none"], ["--preamble", str(tmp_path / "own.txt")]):
        assert main([*words, *more]) == 0
        result = json.loads(capsys.readouterr().out)
        found[result["preamble"]] = result["plain"]["mc2"]["mean"]
    assert set(found) == {"published", "none", "own"}
    assert len(set(found.values())) == 3


def test_lines_end_where_they_end(tmp_path: Path) -> None:
    row = {**FACTOR, "completion": "She\u2028liked\u0085it."}
    (tmp_path / "factor_news.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    assert read_items("factor_news", tmp_path)[0].true == (" She\u2028liked\u0085it.",)
    (tmp_path / "TruthfulQA.csv").write_text(
        'Question,Best Answer,Correct Answers,Incorrect Answers\nWhy?,"So\nit is",So,Never\n', "utf-8"
    )
    assert read_items("truthfulqa", tmp_path)[0].single == (" So\nit is.", (" Never.",))


def test_the_command_sets_models_and_scores_side_by_side(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score", str(MODEL), "--task", "factor_news", "--task-data", str(data), "--baseline", str(MODEL)]
    assert main([*words, "--dola", "1,2", "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["plain"] == result["baseline"]["plain"] and result["items"] == 1
    assert result["dola"]["candidates"] == [1, 2] and result["dola"]["relative_top"] == 0.1
    assert result["gain"]["accuracy"]["mean"] == (
        result["contrasted"]["accuracy"]["mean"] - result["plain"]["accuracy"]["mean"]
    )
    assert main([*words, "-q"]) == 0
    assert "DoLa" in capsys.readouterr().out


def test_the_published_layers_are_the_default_of_each_task(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task, layers in (("truthfulqa", "high"), ("factor_news", "low")):
        assert judge(MODEL, task, data, preamble="")["dola"]["layers"] == layers
        words = ["score", str(MODEL), "--task", task, "--task-data", str(data), "--dola-norm", "final", "--json", "-q"]
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)["dola"]["layers"] == layers
    assert main(["score", str(MODEL), "--task", "factor", "--task-data", str(data)]) == 2
    assert "Did you mean 'factor_news'" in capsys.readouterr().err


def test_a_model_that_is_missing_is_named_before_the_other_is_scored(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the baseline was loaded first")

    monkeypatch.setattr("prunus.evaluation.factual.load_model", load)
    with pytest.raises(PrunusError, match="nowhere"):
        judge(data / "nowhere", "truthfulqa", data, baseline=MODEL)


def test_layers_outside_the_model_are_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(MODEL), "--task", "factor_news", "--task-data", str(data), "--dola", "5", "-q"]) == 2
    assert "DoLa's layer 5 is outside the model: premature layers are 0" in capsys.readouterr().err
    assert main(["generate", str(MODEL), "--prompt", "Once", "--dola", "1,7"]) == 2
    said = capsys.readouterr()
    assert "DoLa's layer 7 is outside the model" in said.err and said.out == ""


def test_what_is_wrong_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'truthfulqa'"):
        read_items("truthfulq", data)
    with pytest.raises(CalibrationError, match=r"factor_expert\.jsonl"):
        read_items("factor_expert", data)
    (tmp_path / "factor_expert.jsonl").write_text('{"full_prefix": "a"}\n', "utf-8")
    with pytest.raises(CalibrationError, match="row 1, is no item of factor_expert: it has no 'contradiction_0'"):
        read_items("factor_expert", tmp_path)
    lone = {**TRUTHFUL, "mc1_targets": {"choices": ["She liked to play."], "labels": [1]}}
    (tmp_path / "truthfulqa_mc.jsonl").write_text(json.dumps(lone) + "\n", "utf-8")
    (tmp_path / "truthfulqa_mc.validation.jsonl").unlink()
    with pytest.raises(CalibrationError, match="row 1, has no true or no false statement"):
        read_items("truthfulqa", tmp_path)
    (tmp_path / "truthfulqa_mc.jsonl").write_text(json.dumps(TRUTHFUL) + "\n", "utf-8")
    for content, said in (("\n{\n", "line 2 is not JSON"), ("[1]\n", "line 1 is no JSON object but list")):
        (tmp_path / "factor_expert.jsonl").write_text(content, "utf-8")
        with pytest.raises(CalibrationError, match=said):
            read_items("factor_expert", tmp_path)
    packed = bytearray(gzip.compress(b'{"full_prefix": "a"}' * 50))
    packed[10] = 0xFF  # a kind of block that deflate does not have
    (tmp_path / "factor_news.jsonl.gz").write_bytes(packed)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_items("factor_news", tmp_path)
    with pytest.raises(CalibrationError, match=r"512 positions.*--preamble none"):
        judge(MODEL, "truthfulqa", data, preamble="word " * 600)
    with pytest.raises(RecipeError, match="limit"):
        judge(MODEL, "truthfulqa", data, limit=0)
