"""Laws of calibration: the same question gives the same tokens, from whichever door the text comes in."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.data.calibration import calibrate, windows
from prunus.data.reading import EMBEDDED, hash_arrays, read, wikitext
from prunus.data.tokens import head_token, load_tokenizer, positions, puts_bos, stream
from prunus.errors import CalibrationError, RecipeError

ASSETS = Path(__file__).parent / "assets"
STORIES = ASSETS / "stories260k"
TEXT = ASSETS / "tinystories-head.txt"
DOCUMENTS = ("One day, a cat sat.", "Lily had a big red ball.", "The end \u2013 at last.\n")


def ids(source: object, **settings: object) -> torch.Tensor:
    """Token ids of a small calibration."""
    return calibrate(source, STORIES, **{"samples": 4, "length": 32, "bos": "never", **settings}).inputs["input_ids"]


# --- windows ----------------------------------------------------------------------------------------------------------


@given(tokens=st.integers(8, 60), samples=st.integers(1, 9), length=st.integers(2, 8), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_window_is_a_stretch_of_the_stream(tokens, samples, length, seed) -> None:
    found = windows(np.arange(100, 100 + tokens), samples, length, seed, None, "text")
    assert found.shape == (samples, length)
    assert (np.diff(found, axis=1) == 1).all()
    assert found.min() >= 100
    assert found.max() < 100 + tokens


@given(length=st.integers(2, 8), spare=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_start_occurs_the_first_and_the_last_included(length, spare) -> None:
    found = windows(np.arange(length + spare), 400, length, 0, None, "text")
    assert set(found[:, 0].tolist()) == set(range(spare + 1))


def test_the_seed_decides_and_a_smaller_draw_is_the_head_of_a_larger_one() -> None:
    assert torch.equal(ids(TEXT, seed=3), ids(TEXT, seed=3))
    assert not torch.equal(ids(TEXT, seed=3), ids(TEXT, seed=4))
    assert torch.equal(ids(TEXT, samples=9)[:4], ids(TEXT, samples=4))


def test_the_numbers_of_a_seed_never_change() -> None:
    tokens = np.arange(1000)
    assert windows(tokens, 5, 10, 0, None, "text")[:, 0].tolist() == [836, 751, 416, 256, 506]


def test_global_random_states_are_neither_read_nor_moved() -> None:
    import random

    random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), torch.get_rng_state())
    first = ids(TEXT)
    assert (random.getstate(), torch.get_rng_state().tolist()) == (before[0], before[1].tolist())
    random.seed(2)
    assert torch.equal(first, ids(TEXT))


# --- BOS --------------------------------------------------------------------------------------------------------------


def test_auto_asks_whether_the_tokenizer_puts_a_bos_by_itself() -> None:
    tokenizer = load_tokenizer(STORIES)
    assert puts_bos(tokenizer)
    found = calibrate(TEXT, STORIES, samples=3, length=16)
    assert found.bos
    assert (found.inputs["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    plain = calibrate(TEXT, STORIES, samples=3, length=16, bos="never")
    assert not plain.bos
    assert not (plain.inputs["input_ids"][:, 0] == tokenizer.bos_token_id).any()


def test_a_sample_with_bos_is_bos_and_one_token_of_text_fewer() -> None:
    tokens = stream(read(TEXT, purpose="calibration"), load_tokenizer(STORIES))
    text = tokens.tobytes()
    for row in ids(TEXT, bos="always", samples=5).numpy():
        assert row[0] == 1
        assert row[1:].tobytes() in text


class WithoutBos:
    bos_token_id = None


def test_a_bos_that_the_tokenizer_lacks_cannot_be_asked() -> None:
    assert head_token(WithoutBos(), "auto") is None
    assert head_token(WithoutBos(), "never") is None
    with pytest.raises(RecipeError, match="no BOS token"):
        head_token(WithoutBos(), "always")
    with pytest.raises(RecipeError, match="auto, always, never"):
        head_token(WithoutBos(), "sometimes")


# --- doors ------------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, field: str) -> Path:
    rows = [{field: text, "id": 1} for text in DOCUMENTS]
    if field == "prompt+response":
        rows = [{"prompt": text[:5], "response": text[5:]} for text in DOCUMENTS]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def write_parquet(path: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": list(DOCUMENTS)}), path)
    return path


def test_the_same_documents_are_the_same_tokens_from_every_kind_of_file(tmp_path) -> None:
    kinds = [write_jsonl(tmp_path / "a.jsonl", "text"), write_jsonl(tmp_path / "b.jsonl", "content")]
    kinds.append(write_parquet(tmp_path / "c.parquet"))
    kinds += [zipped(path) for path in kinds]
    readings = [read(path, purpose="calibration") for path in kinds]
    assert {reading.documents for reading in readings} == {DOCUMENTS}
    assert len({reading.sha256 for reading in readings}) == 1


def zipped(path: Path) -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def test_prompt_and_response_are_joined_by_a_line_end_if_there_is_none(tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Why?", "response": "So."}\n{"prompt": "Q:\\n", "response": "A"}\n')
    assert read(path, purpose="calibration").documents == ("Why?\nSo.", "Q:\nA")


def test_documents_are_packed_with_an_eos_between(tmp_path) -> None:
    tokenizer = load_tokenizer(STORIES)
    found = stream(read(write_jsonl(tmp_path / "a.jsonl", "text"), purpose="calibration"), tokenizer).tolist()
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    assert found == [*rows[0], tokenizer.eos_token_id, *rows[1], tokenizer.eos_token_id, *rows[2]]


def test_line_ends_marks_and_compression_do_not_change_a_text(tmp_path) -> None:
    text = "One day.\nThe end.\n"
    variants = {
        "lf.txt": text.encode(),
        "crlf.txt": text.replace("\n", "\r\n").encode(),
        "bom.txt": text.encode("utf-8-sig"),
    }
    variants |= {"packed.txt.gz": gzip.compress(text.encode()), "notes.md": text.encode()}
    for name, content in variants.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name, purpose="calibration").documents == (text,), name


def test_reading_stops_at_the_head_that_was_asked(tmp_path) -> None:
    (tmp_path / "long.txt").write_text("abcdef" * 100)
    assert read(tmp_path / "long.txt", purpose="calibration", head=10).documents == ("abcdefabcd",)
    path = write_jsonl(tmp_path / "a.jsonl", "text")
    assert read(path, purpose="calibration", head=20).documents == DOCUMENTS[:2]


def test_wikitext_rows_are_joined_as_the_data_set_has_them() -> None:
    r"""Rows on the hub: "" for a blank line, else the line with its newline; joined by "\n\n"."""
    assert wikitext(" = A = \n \n b . \n") == "\n\n".join([" = A = \n", "", " b . \n"])
    assert wikitext(" a \n b ") == " a \n\n\n b \n"


def test_the_embedded_texts_are_those_that_the_licence_file_names() -> None:
    from prunus.data import texts

    place = Path(texts.__file__).parent
    licence = (place / "LICENSE.md").read_text()
    assert "CC BY-SA 3.0" in licence
    for name in EMBEDDED.values():
        content = gzip.decompress((place / name).read_bytes())
        row = re.search(rf"`{re.escape(name)}`.*\| ([\d,]+) \| `(\w+)`", licence)
        assert row is not None
        assert int(row[1].replace(",", "")) == len(content)
        assert row[2] == hashlib.sha256(content).hexdigest()


def test_the_embedded_texts_do_not_overlap() -> None:
    calibration, evaluation = (read("wikitext2", purpose=purpose).documents[0] for purpose in EMBEDDED)
    titles = [set(re.findall(r"(?m)^ = [^=\n]+ = $", text)) for text in (calibration, evaluation)]
    assert len(titles[0]) >= 28
    assert not titles[0] & titles[1]


def test_defaults_are_bounded_and_never_the_whole_context() -> None:
    found = calibrate("wikitext2", STORIES, vocabulary=512, limit=100_000)
    assert found.inputs["input_ids"].shape == (128, 512)
    assert found.inputs["input_ids"].dtype == torch.int64
    assert (found.samples, found.length, found.source, found.seed) == (128, 512, "wikitext2", 0)
    assert calibrate(TEXT, STORIES, samples=1, limit=100).length == 100


# --- ids --------------------------------------------------------------------------------------------------------------


def save(path: Path, array: object) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_ids_from_a_file_are_taken_as_they_are_and_need_no_tokenizer(tmp_path, dtype) -> None:
    rows = np.arange(6 * 8).reshape(6, 8).astype(dtype)
    path = save(tmp_path / "ids.npy", rows)
    whole = calibrate(path, tmp_path, vocabulary=48)
    assert whole.inputs["input_ids"].tolist() == rows.tolist()
    assert (whole.samples, whole.length, whole.bos) == (6, 8, False)
    assert calibrate(path, tmp_path, samples=2, length=5).inputs["input_ids"].tolist() == rows[:2, :5].tolist()
    assert calibrate(zipped(path), tmp_path, samples=2).inputs["input_ids"].tolist() == rows[:2].tolist()


def test_fewer_rows_than_asked_are_used_with_a_warning(tmp_path, caplog) -> None:
    path = save(tmp_path / "ids.npy", np.ones((3, 8), dtype=np.int64))
    assert calibrate(path, tmp_path, samples=128, length=512).inputs["input_ids"].shape == (3, 8)
    assert "3 samples, fewer than the 128" in caplog.text


def test_always_puts_a_bos_before_ids_that_lack_it(tmp_path) -> None:
    path = save(tmp_path / "ids.npy", np.full((2, 4), 7))
    found = calibrate(path, STORIES, bos="always")
    assert found.bos
    assert found.inputs["input_ids"].tolist() == [[1, 7, 7, 7]] * 2
    path = save(tmp_path / "begun.npy", np.asarray([[1, 7, 8, 9]]))
    assert calibrate(path, STORIES, bos="always").inputs["input_ids"].tolist() == [[1, 7, 8, 9]]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((2, 3)), "integers"),
        (np.full((2, 3), -1), "negative"),
        (np.ones((2, 3, 4), dtype=int), "integers"),
        (np.ones((0, 4), dtype=int), "shape"),
        (np.asarray([["a"]]), "numbers are needed"),
        (np.asarray([{"a": 1}], dtype=object), "plain numbers"),
        (np.asarray([[1, 600, 2]]), r"token id 600 \(row 0, position 1\), beyond the vocabulary of 512"),
    ],
)
def test_arrays_that_are_no_token_ids_are_refused(tmp_path, array, words) -> None:
    with pytest.raises(CalibrationError, match=words):
        calibrate(save(tmp_path / "ids.npy", array), tmp_path, vocabulary=512)


def test_named_inputs_keep_their_names_and_their_kind(tmp_path) -> None:
    pixels = np.random.default_rng(0).random((3, 3, 4, 4))
    np.savez(tmp_path / "both.npz", input_ids=np.ones((3, 5), dtype=np.int32), pixel_values=pixels)
    found = calibrate(tmp_path / "both.npz", tmp_path, samples=2)
    assert {name: tuple(tensor.shape) for name, tensor in found.inputs.items()} == {
        "input_ids": (2, 5),
        "pixel_values": (2, 3, 4, 4),
    }
    assert found.inputs["pixel_values"].dtype == torch.float32
    np.savez(tmp_path / "images.npz", pixel_values=pixels)
    images = calibrate(tmp_path / "images.npz", tmp_path)
    assert (images.samples, images.length) == (3, 0)
    np.savez(tmp_path / "uneven.npz", a=np.ones(3), b=np.ones(2))
    with pytest.raises(CalibrationError, match="same number of samples"):
        calibrate(tmp_path / "uneven.npz", tmp_path)
    np.savez(tmp_path / "nan.npz", pixel_values=np.full((2, 2), np.nan))
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate(tmp_path / "nan.npz", tmp_path)


@given(st.lists(st.integers(0, 500), min_size=6, max_size=6), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_hash_tells_tokens_and_shapes_apart(row, place) -> None:
    array = np.asarray(row)
    changed = array.copy()
    changed[place] += 1
    hashes = [hash_arrays({"input_ids": one}) for one in (array[None], changed[None], array.reshape(2, 3), array[None])]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]


# --- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("binary.txt", bytes(range(256)), "not UTF-8"),
        ("zeros.txt", b"ab\0cd", "binary"),
        ("short.txt", b"One day.", r"has \d+ tokens, fewer than one sample of 32"),
        ("notes.txt.gz", b"not gzip", "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"hello world" * 99, mtime=0)[:30], "cannot be read"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("fields.jsonl", b'{"body": "a"}', "line 1 has no text.*it has body"),
        ("number.jsonl", b"17", "line 1 has no text"),
        ("type.jsonl", b'{"text": 17}', "line 1 has no text"),
        ("broken.parquet", b"PAR1 no", "not a whole parquet"),
        ("broken.npy", b"no numpy", "plain numbers"),
        ("empty.npy", b"", "plain numbers"),
        ("broken.npz", b"PK\x03\x04no", "plain numbers"),
    ],
)
def test_a_file_that_holds_no_text_says_so(tmp_path, name, content, words) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        ids(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["wikitxt2", "missing.txt", "some/missing.txt", "data/ids.npy", "folder/"])
def test_a_name_that_nothing_has_is_refused_without_a_network(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(CalibrationError, match="There is no text or file") as caught:
        ids(name)
    assert "wikitext2" in str(caught.value)


def test_a_folder_is_no_text(tmp_path) -> None:
    with pytest.raises(CalibrationError, match="is a folder"):
        ids(tmp_path)


@pytest.mark.parametrize("name", ["c4", "owner/name", "owner/name:config:train"])
def test_a_data_set_without_a_network_is_one_clear_sentence(tmp_path, monkeypatch, name) -> None:
    pytest.importorskip("datasets")

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(CalibrationError, match=r"the hub cannot be reached.*wikitext2 or a file"):
        ids(name)


@pytest.mark.parametrize(
    "numbers",
    [{"samples": 0}, {"samples": -1}, {"samples": 1.5}, {"samples": True}, {"length": 1}, {"seed": -1}, {"bos": "yes"}],
)
def test_numbers_out_of_range_are_refused(numbers) -> None:
    with pytest.raises(RecipeError):
        ids(TEXT, **numbers)


def test_samples_longer_than_the_model_are_refused(tmp_path) -> None:
    with pytest.raises(RecipeError, match="512 positions; use length 512"):
        ids(TEXT, length=513, limit=512)
    with pytest.raises(CalibrationError, match="rows of 40 tokens"):
        calibrate(save(tmp_path / "ids.npy", np.ones((2, 40), dtype=int)), tmp_path, limit=32)


def test_a_folder_without_tokenizer_offers_token_ids_as_the_way_out(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CalibrationError, match=r"no tokenizer.*\.npy"):
        calibrate(TEXT, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(CalibrationError, match=r"cannot be loaded.*\.npy"):
        calibrate(TEXT, tmp_path)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 77}, 77),
        ({"n_positions": 88}, 88),
        ({"text_config": {"max_position_embeddings": 99}, "max_position_embeddings": 1}, 99),
        ({"hidden_size": 4}, None),
    ],
)
def test_the_models_positions_are_read_from_its_config(config, limit) -> None:
    assert positions(config) == limit
