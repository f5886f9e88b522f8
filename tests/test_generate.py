"""`prunus generate` and the decoding loop behind it, on a real model of 260,000 weights."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunus.cli import main
from prunus.decoding import ENGINES, find_engine
from prunus.decoding.loop import decode
from prunus.decoding.sampling import Sampling
from prunus.decoding.text import generate, pieces
from prunus.errors import RecipeError

MODEL = Path(__file__).parent / "assets" / "stories260k"
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_has_what_the_table_promises(name: str) -> None:
    module = find_engine(name)
    assert callable(module.load) and callable(module.check)


def test_the_loop_gives_what_transformers_own_gives(model: Any, tokenizer: Any) -> None:
    tokenizer.padding_side, tokenizer.pad_token_id = "left", 0
    batch = tokenizer([PROMPT, "The little dog was very happy and"], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.3}
    theirs = model.generate(**batch, **options)
    *_, last = model.generate(**batch, **options, custom_generate=decode)
    assert last.ids.equal(theirs)


def test_a_seed_draws_the_same_text_and_another_seed_another() -> None:
    first, again, other = (
        generate(MODEL, PROMPT, Sampling(max_new_tokens=30, temperature=1.0, top_p=0.95, seed=seed))["text"]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_low_temperature_is_greedy() -> None:
    greedy, cold = (generate(MODEL, PROMPT, Sampling(max_new_tokens=20, temperature=t)) for t in (0.0, 1e-3))
    assert greedy["ids"] == cold["ids"]


def test_text_stops_at_the_end_token_and_does_not_show_it(model: Any, tokenizer: Any) -> None:
    # Any token can be made the end: then the text must stop before it.
    from prunus.decoding.stock import Stock

    ids = tokenizer(PROMPT)["input_ids"]
    how = Sampling(max_new_tokens=60)
    whole = list(Stock(model).stream(ids, how))
    end = whole[25]
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, end
    try:
        assert list(Stock(model).stream(ids, how)) == whole[: whole.index(end)]
    finally:
        model.generation_config.eos_token_id = before


def test_pieces_join_to_the_text_and_never_split_a_character() -> None:
    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    text = "Grüße, 世界! 🙂 " * 20
    made = list(pieces(Bytes(), list(b"Hello: "), text.encode()))
    assert "".join(made) == text
    assert all("\ufffd" not in piece for piece in made)


def test_the_command_prints_prompt_and_continuation_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(MODEL), "--prompt", PROMPT, "--max-new-tokens", "8"]) == 0
    captured = capsys.readouterr()
    whole = generate(MODEL, PROMPT, Sampling(max_new_tokens=8))
    assert captured.out == PROMPT + whole["text"] + "\n"
    assert "8 tokens" in captured.err


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(MODEL), "--prompt", PROMPT, "--max-new-tokens", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == len(result["ids"]) == 3
    assert result["ended"] == "length"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--engine", "tranformers"], "transformers"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0.5"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "many"], "whole number"),
        (["--max-new-tokens", "1000"], "positions"),
        (["--prompt", " "], "empty"),
    ],
)
def test_a_slip_is_answered_in_one_sentence(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(MODEL), "--prompt", PROMPT, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and part in captured.err and "Traceback" not in captured.err


def test_standard_input_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"once \xff"), encoding="utf-8"))
    assert main(["generate", str(MODEL), "--prompt", "-"]) == 2
    assert "no UTF-8" in capsys.readouterr().err


def test_ids_beyond_the_vocabulary_are_refused(model: Any) -> None:
    from prunus.decoding.stock import Stock
    from prunus.errors import CalibrationError

    with pytest.raises(CalibrationError, match="999"):
        list(Stock(model).stream([1, 999], Sampling()))
    with pytest.raises(RecipeError, match="top_k"):
        Sampling(temperature=1.0, top_k=0)
