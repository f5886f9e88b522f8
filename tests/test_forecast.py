"""`prunus forecast` and the markov probe as a user meets them, on a real model of 260,000 weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunus.cli import main
from prunus.errors import FormatError, ModelError, PrunusError
from prunus.forecasting.forecast import Options, forecast
from prunus.forecasting.serial import probe_number_tokenizer
from prunus.forecasting.series import read_series

MODEL = str(Path(__file__).parent / "assets" / "stories260k")


def write(path: Path, values: Any, **columns: Any) -> Path:
    """A log as recovery writes it."""
    rows = ["step,seconds,loss,lr,heldout"]
    for place, value in enumerate(values):
        step = columns["steps"][place] if "steps" in columns else place * 10
        rows.append(f"{step},{place * 0.5},{value},0.001,{columns['heldout'][place] if 'heldout' in columns else ''}")
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def values() -> list[float]:
    generator = np.random.default_rng(0)
    value, made = 3.0, []
    for _ in range(60):
        value += -0.2 * (value - 2.0) + 0.05 * generator.standard_normal()
        made.append(round(value, 4))
    return made


def test_the_command_tells_limit_methods_and_verdict(
    tmp_path: Path, values: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path / "log.csv", values)
    assert main(["forecast", str(log), "--model", MODEL, "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["column"], result["rows"], result["held"], result["every"]) == ("loss", 60, 15, 10)
    assert set(result["methods"]) == {"model", "persistence", "AR(1)", "bigram", "power law", "mean"}
    assert result["limit"]["low"] <= result["limit"]["high"] and 0 < result["gap"] <= 1
    assert result["wins"] == (result["best"] == "model") == ("did not beat" not in result["verdict"])
    from prunus.cli.forecast import text

    shown = text(result)
    assert result["verdict"].split(",")[0] in shown and "held back" in shown and "AR(1)" in shown


def test_json_lines_and_a_column_that_is_not_in_every_row(tmp_path: Path, values: list[float]) -> None:
    file = tmp_path / "log.jsonl"
    lines = []
    for place, value in enumerate(values):
        lines.append({"step": 2 * place, "loss": 1.0 + place})
        lines.append({"step": 2 * place + 1, "loss": 1.5 + place, "heldout": value})
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    series = read_series(file, "heldout")
    assert series.values.tolist() == values and series.every == 2 and series.last == 119
    assert len(read_series(file).values) == 120


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda rows: rows[:30], "at least 40 are needed (10 more)"),
        (lambda rows: [*rows[:9], "nan", *rows[10:]], "nan in row 10"),
        (lambda rows: [*rows[:9], "inf", *rows[10:]], "inf in row 10"),
        (lambda rows: [*rows[:9], "", *rows[10:]], "gap: after step 80 comes 100"),
        (lambda rows: [*rows[:9], "much", *rows[10:]], "'much' in row 10"),
        (lambda rows: [2.5] * len(rows), "constant"),
    ],
)
def test_a_log_that_cannot_be_forecast_is_refused_with_its_row(
    change: Any, part: str, tmp_path: Path, values: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path / "log.csv", change(values))
    assert main(["forecast", str(log), "--model", MODEL]) == 2
    said = capsys.readouterr()
    assert part in said.err and said.out == "" and "Traceback" not in said.err


def test_other_broken_logs(tmp_path: Path, values: list[float]) -> None:
    steps = [place * 10 + (5 if place > 20 else 0) for place in range(60)]
    with pytest.raises(FormatError, match="after step 200 comes 215"):
        read_series(write(tmp_path / "a.csv", values, steps=steps))
    with pytest.raises(FormatError, match="step is nan in row 8"):
        read_series(write(tmp_path / "a.csv", values, steps=[*range(7), "nan", *range(8, 60)]))
    with pytest.raises(FormatError, match="do not rise"):
        read_series(write(tmp_path / "b.csv", values, steps=[-place for place in range(60)]))
    with pytest.raises(FormatError, match="Did you mean 'loss'"):
        read_series(write(tmp_path / "c.csv", values), "los")
    (tmp_path / "d.csv").write_text("a,b\n1,2\n", "utf-8")
    with pytest.raises(FormatError, match="--column: a, b"):
        read_series(tmp_path / "d.csv")
    (tmp_path / "e.csv").write_text("a,b\n1\n", "utf-8")
    with pytest.raises(FormatError, match="row 1"):
        read_series(tmp_path / "e.csv", "a")
    (tmp_path / "f.jsonl").write_text('{"a": 1}\n{"a": \n', "utf-8")
    with pytest.raises(FormatError, match="line 2"):
        read_series(tmp_path / "f.jsonl")
    (tmp_path / "g.json").write_text('[{"a": 1}, {"a": 2}]', "utf-8")
    with pytest.raises(FormatError, match="one object a line"):
        read_series(tmp_path / "g.json")
    with pytest.raises(FormatError, match="cannot be read"):
        read_series(tmp_path / "none.csv")


def test_what_is_read_of_a_log_may_not_stand_still(tmp_path: Path, values: list[float]) -> None:
    log = write(tmp_path / "log.csv", [*values, *[2.0] * 40])
    with pytest.raises(FormatError, match="The 40 values to read are all 2; "):
        forecast(log, MODEL, options=Options(points=40))
    log = write(tmp_path / "log.csv", [*[2.0] * 60, *values[:20]])
    with pytest.raises(FormatError, match="The 60 values to read are all 2; "):
        forecast(log, MODEL)


def test_fewer_values_than_the_log_has_are_no_fault_of_the_model(tmp_path: Path, values: list[float]) -> None:
    log = write(tmp_path / "log.csv", values)
    result = forecast(log, MODEL, options=Options(points=40, digits=1, within=0.01))
    assert result["read"] == 40 and "as were asked for" in result["warnings"][0]
    # A tenth of the states is no finer than 1/7 of the range, so what is promised is no finer either.
    read = np.array(values[-40:])
    assert result["arrival"]["within"] == pytest.approx(0.51 * (read.max() - read.min()) / 7)


@pytest.mark.parametrize(
    "wrong", [{"digits": 4}, {"points": 39}, {"within": 0.0}, {"temperature": 0.0}, {"extrapolate": "x"}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PrunusError, match=next(iter(wrong))):
        Options(**wrong)


class Toy:
    """A tokenizer of whole words from a list, longest first."""

    def __init__(self, *words: str) -> None:
        self.words = {word: index for index, word in enumerate(words)}

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        ids, place = [], 0
        while place < len(text):
            word = next(w for w in sorted(self.words, key=len, reverse=True) if text.startswith(w, place))
            ids.append(self.words[word])
            place += len(word)
        return {"input_ids": ids}


def test_each_kind_of_tokenizer_is_recognised() -> None:
    digits = [str(digit) for digit in range(10)]
    assert probe_number_tokenizer(Toy(*digits, ",")).kind == "digit"
    triples = [f"{number:03d}" for number in range(1000)]
    assert probe_number_tokenizer(Toy(*triples, *digits, ",")).kind == "triple"
    assert probe_number_tokenizer(Toy(*digits, "12", "678", ",")).kind == "forced"
    with pytest.raises(ModelError, match="no single tokens"):
        probe_number_tokenizer(Toy(*digits, *(f"{digit}," for digit in digits), ","))


def test_the_probe_sets_the_pruned_model_beside_the_dense_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", MODEL, "--baseline", MODEL, "--probe", "markov", "--json", "-q"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["area"] == result["baseline"]["area"] > result["counting"] > 0
    assert result["learned"] == pytest.approx(1 - result["area"] / result["uniform"])
    from prunus.cli.evaluate import probe_text

    assert "who counts transitions" in probe_text(result)
    assert main(["evaluate", MODEL, "--probe", "markof"]) == 2
    assert "Did you mean 'markov'" in capsys.readouterr().err
    assert main(["evaluate", MODEL, "--probe", "markov", "--windows", "3"]) == 2
    assert "--windows" in capsys.readouterr().err
