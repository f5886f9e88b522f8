"""Laws of the perplexity: the textbook loop, whatever the memory, the BOS and the order of asking."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import FAMILIES, tiny_model
from prunus.data.reading import read
from prunus.errors import CalibrationError, ModelError, RecipeError
from prunus.evaluation.losses import Pieces, plan_pieces, token_losses
from prunus.evaluation.perplexity import evaluate, summary
from prunus.evaluation.sample import first_sentence, sample
from prunus.evaluation.size import weight_bytes
from prunus.evaluation.windows import cut

ASSETS = Path(__file__).parent / "assets"
STORIES = ASSETS / "stories260k"
TEXT = ASSETS / "tinystories-head.txt"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


def textbook(model, ids: list[int], length: int, head: list[int]) -> float:
    """The published loop, in plain Python: per window the mean of -log softmax, then the mean, then exp."""
    window_means = []
    for window in range(len(ids) // length):
        tokens = head + ids[window * length : (window + 1) * length]
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0].double()
        losses = [-(logits[t].log_softmax(-1)[tokens[t + 1]]).item() for t in range(len(tokens) - 1)]
        window_means.append(sum(losses) / len(losses))
    return math.exp(sum(window_means) / len(window_means))


@pytest.mark.parametrize(("bos", "head"), [("never", []), ("auto", [1]), ("always", [1])])
def test_perplexity_is_the_textbook_loop(model, bos, head) -> None:
    ids = AutoTokenizer.from_pretrained(STORIES)(TEXT.read_text(), add_special_tokens=False)["input_ids"]
    found = evaluate(STORIES, text=TEXT, length=96, windows=7, bos=bos)
    assert found["perplexity"] == pytest.approx(textbook(model, ids[:700], 96, head), rel=1e-5)
    assert found["bos"] is bool(head)
    assert found["predictions"] == 7 * (96 if head else 95)


@pytest.mark.parametrize(("bos", "targets"), [("never", 63), ("always", 64)])
def test_no_more_than_length_positions_are_ever_read(bos, targets) -> None:
    windows = cut(read(TEXT, purpose="evaluation"), STORIES, 64, bos)
    read_ids, wanted = windows.pair(2)
    assert read_ids.shape == (1, 64)
    assert wanted.tolist() == windows.ids[2, 64 - targets :].tolist()


def test_a_model_that_learned_stories_is_good_at_stories() -> None:
    found = evaluate(STORIES, text=TEXT, length=512, bos="never")
    assert 3.8 < found["perplexity"] < 4.2
    assert (found["windows"], found["length"], found["tokens"]) == (18, 512, 18 * 512)
    assert 18 * 512 <= found["text_tokens"] < 19 * 512


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(tmp_path) -> None:
    copy = shutil.copytree(STORIES, tmp_path / "blank")
    blank = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        blank.get_input_embeddings().weight.zero_()
    blank.save_pretrained(copy)
    assert evaluate(copy, text=TEXT, length=64, windows=2)["perplexity"] == pytest.approx(512, rel=1e-6)


def test_the_result_is_json_with_all_that_a_number_needs() -> None:
    found = json.loads(json.dumps(evaluate(STORIES, text=TEXT, length=64, windows=3)))
    wanted = {"model", "perplexity", "windows", "length", "tokens", "text", "seconds", "bos", "dtype", "device"}
    assert wanted <= set(found)
    assert set(found["versions"]) == {"prunus", "torch", "transformers"}
    assert found["dtype"] == "float32"
    assert len(found["text_sha256"]) == 64


def test_windows_are_the_first_ones_and_indices_pick_any() -> None:
    losses = [evaluate(STORIES, text=TEXT, length=64, indices=[w])["loss"] for w in range(3)]
    first = evaluate(STORIES, text=TEXT, length=64, windows=3)
    assert first["loss"] == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert first["loss_stderr"] == pytest.approx(float(np.std(losses, ddof=1)) / math.sqrt(3), abs=1e-6)
    assert evaluate(STORIES, text=TEXT, length=64, indices=[2, 0])["loss"] == pytest.approx((losses[2] + losses[0]) / 2)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_the_summary_is_the_exponential_of_the_mean(means) -> None:
    found = summary(means)
    assert found["perplexity"] == pytest.approx(math.exp(sum(means) / len(means)))
    assert (found["loss_stderr"] is None) == (len(means) == 1)


def test_ids_from_a_file_are_windows_within_each_row_and_need_no_tokenizer(tmp_path) -> None:
    ids = AutoTokenizer.from_pretrained(STORIES)(TEXT.read_text(), add_special_tokens=False)["input_ids"]
    np.save(tmp_path / "one.npy", np.asarray(ids))
    bare = shutil.copytree(STORIES, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    from_ids = evaluate(bare, text=tmp_path / "one.npy", length=64, windows=4)
    assert from_ids["perplexity"] == pytest.approx(
        evaluate(STORIES, text=TEXT, length=64, windows=4, bos="never")["perplexity"]
    )
    np.save(tmp_path / "rows.npy", np.asarray(ids[:300]).reshape(3, 100))
    assert evaluate(bare, text=tmp_path / "rows.npy", length=48)["windows"] == 6


# --- the baseline -----------------------------------------------------------------------------------------------------


def test_a_model_is_its_own_equal(model) -> None:
    found = evaluate(STORIES, baseline=STORIES, text=TEXT, length=64, windows=2, sample="Once upon a time")
    assert found["ratio"] == 1
    assert found["baseline"]["perplexity"] == found["perplexity"]
    assert found["baseline"]["sample"] == found["sample"]
    assert found["baseline"]["windows"] == found["windows"]


def test_the_baseline_comes_first_and_progress_is_told_of_every_window() -> None:
    told: list[str] = []

    class Listener:
        def stage(self, name: str, total: int) -> None:
            told.append(f"{name} {total}")

        def advance(self, note: str = "", error: float | None = None) -> None:
            told.append(note)

        def warn(self, text: str) -> None:
            pytest.fail(text)

        def close(self) -> None:
            pytest.fail("not its to close")

    evaluate(STORIES, baseline=STORIES, text=TEXT, length=64, windows=2, progress=Listener())
    assert told == ["evaluate stories260k 2", "window 0", "window 1"] * 2


def test_two_models_that_cut_the_text_differently_are_not_compared(tmp_path) -> None:
    other = shutil.copytree(STORIES, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="different tokens"):
        evaluate(other, baseline=STORIES, text=TEXT, length=64, windows=2)


# --- logits in pieces -------------------------------------------------------------------------------------------------

AFTER_THE_HEAD = ("gemma2", "cohere", "granite", "llama", "gpt2", "opt", "mixtral", "bloom", "gemma3_text", "phi3")


@pytest.mark.parametrize("name", AFTER_THE_HEAD)
def test_losses_in_pieces_are_the_losses_at_once(name) -> None:
    tiny = tiny_model(FAMILIES[name]).eval()
    ids = torch.randint(8, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    whole = token_losses(tiny, ids, ids[0, 1:])
    assert plan_pieces(tiny, ids) is None
    pieces = plan_pieces(tiny, ids, budget=4 * 128 * 7)
    assert isinstance(pieces, Pieces), "this family must allow pieces"
    assert pieces.rows == 7
    assert torch.allclose(whole, token_losses(tiny, ids, ids[0, 1:], pieces=pieces), atol=1e-5)
    assert "forward" not in vars(pieces.body)
    assert not pieces.body._forward_hooks


def test_a_model_that_takes_no_positions_gets_the_plain_way(model, monkeypatch) -> None:
    ids = torch.arange(3, 40)[None]
    forward = type(model).forward
    assert plan_pieces(model, ids, budget=4 * 512) is not None
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, use_cache: forward(self, input_ids))
    assert plan_pieces(model, ids, budget=4 * 512) is None


def test_a_model_that_answers_differently_in_pieces_gets_the_plain_way(model, monkeypatch) -> None:
    """A head that looks at the length of what it gets, as no honest model does."""
    forward = type(model).forward

    def odd(self, input_ids, use_cache, logits_to_keep=0):
        output = forward(self, input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)
        output.logits = output.logits * input_ids.shape[1]
        return output

    monkeypatch.setattr(type(model), "forward", odd)
    assert plan_pieces(model, torch.arange(3, 40)[None], budget=4 * 512) is None


# --- what cannot be measured ------------------------------------------------------------------------------------------


def broken(folder: Path, change) -> Path:
    """A copy of the model with one weight changed or dropped."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(STORIES, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_numbers_that_are_not_finite_name_the_window(tmp_path) -> None:
    bad = broken(tmp_path / "nan", lambda state: state["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ModelError, match="window 3"):
        evaluate(bad, text=TEXT, length=64, indices=[3])


def test_missing_weights_are_not_replaced_by_random_ones(tmp_path) -> None:
    bad = broken(tmp_path / "gap", lambda state: state.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 weights.*layers\.2\.mlp\.up_proj"):
        evaluate(bad, text=TEXT, length=64, windows=1)


def test_a_truncated_checkpoint_cannot_be_loaded(tmp_path) -> None:
    bad = shutil.copytree(STORIES, tmp_path / "cut")
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        evaluate(bad, text=TEXT, length=64, windows=1)


def test_a_model_of_another_kind_is_named(tmp_path) -> None:
    bad = shutil.copytree(STORIES, tmp_path / "clip")
    (bad / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="causal language model"):
        evaluate(bad, text=TEXT, length=64, windows=1)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"length": 1}, RecipeError, "at least 2"),
        ({"windows": 0}, RecipeError, "at least 1"),
        ({"windows": 1, "indices": [0]}, RecipeError, "either"),
        ({"indices": []}, RecipeError, "at least one"),
        ({"length": 513}, RecipeError, "512 positions"),
        ({"windows": 999}, CalibrationError, "has 149 windows"),
        ({"indices": [149]}, CalibrationError, "number 149"),
        ({"bos": "maybe"}, RecipeError, "auto, always, never"),
        ({"device": "toaster"}, RecipeError, "use cpu"),
        ({"dtype": "float23"}, RecipeError, "Did you mean 'float32'"),
        ({"text": "nothing.txt"}, CalibrationError, "no text or file"),
        ({"limit": 5}, RecipeError, "limit is about benchmark tasks"),
        ({"task_data": "tasks"}, RecipeError, "task_data is about benchmark tasks"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, error, words) -> None:
    with pytest.raises(error, match=words):
        evaluate(STORIES, **{"text": TEXT, "length": 64, **settings})


def test_a_text_shorter_than_one_window_says_how_much_there_is(tmp_path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time.")
    with pytest.raises(CalibrationError, match=r"short\.txt has \d+ tokens, fewer than one window of 64"):
        evaluate(STORIES, text=tmp_path / "short.txt", length=64)
    np.savez(tmp_path / "images.npz", pixel_values=np.ones((2, 3)))
    with pytest.raises(CalibrationError, match="other than input_ids"):
        evaluate(STORIES, text=tmp_path / "images.npz", length=64)
    np.save(tmp_path / "foreign.npy", np.full((1, 64), 512))
    with pytest.raises(CalibrationError, match="beyond the vocabulary of 512"):
        evaluate(STORIES, text=tmp_path / "foreign.npy", length=64)


# --- a sentence, a size -----------------------------------------------------------------------------------------------


def test_a_sentence_is_greedy_one_line_and_ends_where_a_sentence_ends(model) -> None:
    prompt = "Once upon a time, there was a"
    said = sample(STORIES, prompt=prompt)
    assert said == "Once upon a time, there was a little girl named Lily."
    assert said == sample(model, AutoTokenizer.from_pretrained(STORIES), prompt=prompt)
    with pytest.raises(CalibrationError, match="empty"):
        sample(STORIES, prompt=" ")


@pytest.mark.parametrize(
    ("new", "kept"),
    [
        (" b. C d", "A b."),
        (" b\nc", "A b c"),
        (' said "no!" And', 'A said "no!"'),
        (" is 3.5 m high. And", "A is 3.5 m high."),
        ("", "A"),
    ],
)
def test_the_first_sentence_ends_at_a_mark_before_a_blank(new, kept) -> None:
    assert first_sentence("A", new) == kept


def test_the_size_is_that_of_the_weights_alone(tmp_path) -> None:
    assert weight_bytes(STORIES) == (STORIES / "model.safetensors").stat().st_size
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    (tmp_path / "b.safetensors").write_bytes(b"123")
    (tmp_path / "notes.txt").write_bytes(b"123")
    assert weight_bytes(tmp_path) == 8


def test_the_docs_quote_the_keys_that_exist() -> None:
    text = (Path(__file__).parents[1] / "docs" / "calibration.md").read_text()
    quoted = set(re.findall(r"^\| `(\w+)` \|", text.split("## What `evaluate` returns")[1], re.MULTILINE))
    found = evaluate(STORIES, baseline=STORIES, text=TEXT, length=64, windows=1, sample="Once")
    assert quoted == set(found)
