"""Packed models that run: the compiled engine and sparse modules say what transformers says."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Qwen2Config, StableLmConfig

import prunus
from prunus.cli import main
from prunus.decoding.dola.options import Dola
from prunus.decoding.sampling import Sampling
from prunus.decoding.text import generate
from prunus.errors import ModelError, PrunusError, RecipeError
from prunus.packed.linear import SparseLinear, load_sparse
from prunus.packed.pack import pack
from prunus.packed.running import PackedModel, open_model
from prunus.packed.weights import engine_weights
from prunus.runtime.engine import Engine
from prunus.runtime.kernels import Linear
from prunus.runtime.native import available
from prunus.runtime.plan import NotCovered

STORIES = Path(__file__).parent / "assets" / "stories260k"
IDS = torch.arange(3, 40)[None]

kernels = pytest.mark.skipif(available() is None, reason="no compiled kernels here")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pruned folder and its packed forms."""
    place = tmp_path_factory.mktemp("running")
    prunus.prune(STORIES, place / "pruned", method="wanda", sparsity=0.5, samples=4, length=64)
    for values in ("lossless", "int8", "int4"):
        prunus.export(place / "pruned", place / values, format="packed", type=values)
    return place


@pytest.fixture(scope="module")
def dense(folders):
    return AutoModelForCausalLM.from_pretrained(folders / "pruned", dtype=torch.float32).eval()


def off(model, dense, ids=IDS):
    """Largest difference of a logit, over the largest logit."""
    with torch.no_grad():
        wanted = dense(ids).logits
        return float((model(ids).logits - wanted).abs().max() / wanted.abs().max())


@kernels
@pytest.mark.parametrize(("values", "most"), [("lossless", 1e-5), ("int8", 0.04), ("int4", 0.4)])
def test_the_engine_computes_what_the_pruned_model_does(values, most, folders, dense, caplog):
    with caplog.at_level(logging.WARNING, logger="prunus"):
        model = prunus.load(folders / values)
    assert isinstance(model, PackedModel)
    assert not caplog.records
    assert off(model, dense) < most


@kernels
def test_generate_takes_transformers_arguments(folders, dense):
    model = prunus.load(folders / "lossless")
    for how in (
        {"max_new_tokens": 20, "do_sample": False},
        {"max_length": 50, "do_sample": False, "repetition_penalty": 1.3},
        {"max_new_tokens": 8, "num_beams": 1, "do_sample": False, "suppress_tokens": [400, 401], "use_cache": True},
    ):
        assert torch.equal(model.generate(IDS, **how), dense.generate(IDS, pad_token_id=0, **how))
    two = model.generate(IDS.repeat(2, 1), max_new_tokens=5, do_sample=False)
    assert torch.equal(two[0], two[1])
    assert two.shape == (2, IDS.shape[1] + 5)
    drawn = [
        model.generate(
            IDS, do_sample=True, top_k=50, temperature=1.5, max_new_tokens=9, generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    loss = model(IDS, labels=IDS).loss
    assert float(loss) == pytest.approx(dense(IDS, labels=IDS).loss.item(), rel=1e-4)


class Recorder:
    """A streamer that notes what it is given."""

    def __init__(self):
        self.given, self.ended = [], 0

    def put(self, value):
        self.given.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


@kernels
def test_a_streamer_is_called_as_by_transformers(folders, dense):
    ours, theirs = Recorder(), Recorder()
    how = {"max_new_tokens": 6, "do_sample": False}
    prunus.load(folders / "lossless").generate(IDS, streamer=ours, **how)
    dense.generate(IDS, streamer=theirs, pad_token_id=0, **how)
    assert ours.given == theirs.given and ours.given[0] == IDS[0].tolist() and ours.ended == theirs.ended == 1


@kernels
def test_lengths_and_the_generation_config_are_those_of_transformers(folders, dense):
    model = prunus.load(folders / "lossless")
    for how in ({"max_new_tokens": 0}, {"max_length": IDS.shape[1]}, {"max_length": 5}):
        with pytest.raises(RecipeError, match=r"no new token"):
            model.generate(IDS, **how)
    with pytest.raises(RecipeError, match="one text"):
        model.generate(IDS.repeat(2, 1), max_new_tokens=2, streamer=Recorder())
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.max_new_tokens = 3
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.cache_implementation = "hybrid"
    want = dense.generate(IDS, max_new_tokens=3, repetition_penalty=1.5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(IDS), want)
    assert model.generate(IDS, max_length=IDS.shape[1] + 1).shape[1] == IDS.shape[1] + 1
    model.generation_config.num_beams = 3
    model.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(RecipeError, match=r"generation_config.json asks for n"):
        model.generate(IDS)
    with pytest.raises(RecipeError, match="no_repeat_ngram_size=2"):
        model.generate(IDS, num_beams=1)


@kernels
def test_min_p_is_that_of_transformers(folders):
    model = prunus.load(folders / "lossless")
    how = {"do_sample": True, "max_new_tokens": 6, "generator": torch.Generator().manual_seed(0)}
    greedy = model.generate(IDS, do_sample=False, max_new_tokens=6)
    assert torch.equal(model.generate(IDS, min_p=1.0, **how), greedy)  # nothing but the likeliest is left


@kernels
def test_a_choice_out_of_range_is_refused_and_zero_is_a_number(folders):
    model = prunus.load(folders / "lossless")
    draw = {"do_sample": True, "max_new_tokens": 4, "generator": torch.Generator().manual_seed(0)}
    for odd in ({"temperature": 0.0}, {"top_k": -1}, {"top_p": 1.5}, {"min_p": 2}, {"repetition_penalty": 0.0}):
        with pytest.raises(RecipeError, match=f"{next(iter(odd))}="):
            model.generate(IDS, **draw, **odd)
    greedy = model.generate(IDS, do_sample=False, max_new_tokens=4)
    assert torch.equal(model.generate(IDS, top_p=0.0, temperature=3.0, **draw), greedy)  # the likeliest alone is left


@kernels
def test_a_token_with_the_id_0_ends_a_text(folders):
    model = prunus.load(folders / "lossless")
    how = Sampling(max_new_tokens=6)
    first, *rest = model.stream(IDS[0].tolist(), how)
    assert rest
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = 0
    model.engine = Swapped(model.engine, first)
    assert list(model.stream(IDS[0].tolist(), how)) == []


class Swapped:
    """An engine whose token `other` is called 0."""

    def __init__(self, engine, other):
        self.engine, self.other, self.context = engine, other, engine.context

    def reset(self):
        return self.engine.reset()

    def prefill(self, ids, of):
        logits = self.engine.prefill(ids, of=of)
        logits[[0, self.other]] = logits[[self.other, 0]]
        return logits


@kernels
def test_two_texts_at_once_are_refused_and_not_mixed(folders):
    model = prunus.load(folders / "lossless")
    one, two = (model.stream(ids, Sampling(max_new_tokens=5)) for ids in ([3, 4, 5], [6, 7]))
    alone = list(model.stream([6, 7], Sampling(max_new_tokens=5)))
    next(one)
    first = next(two)
    with pytest.raises(RecipeError, match="another was begun"):
        next(one)
    assert [first, *two] == alone


@kernels
def test_logits_that_are_no_numbers_are_told(folders):
    weights = engine_weights(folders / "lossless")
    huge = weights["model.norm.weight"] * 3e38
    model = prunus.load(folders / "lossless")
    model.engine = Engine(model.config, weights | {"model.norm.weight": huge})
    for how in ({"do_sample": False}, {"do_sample": True}):
        with pytest.raises(ModelError, match="not finite"):
            model.generate(IDS, max_new_tokens=2, **how)


@kernels
def test_ids_of_no_text_are_refused(folders):
    model = prunus.load(folders / "int8")
    for ids in (torch.arange(3, 9), torch.zeros(1, 0).long(), torch.zeros(0, 4).long(), torch.ones(1, 3)):
        for read in (model, model.generate):
            with pytest.raises(RecipeError, match="texts, tokens"):
                read(ids)


@kernels
def test_a_process_that_was_forked_does_not_wait_for_threads_that_it_lacks(folders):
    model = prunus.load(folders / "int8")
    native = dataclasses.replace(model.engine._native, process=-1)
    model.engine._native = native
    sparse = Linear(pack(torch.eye(16), "fp32"), native)
    for compute in (lambda: model(IDS), lambda: sparse(torch.ones(16))):
        with pytest.raises(PrunusError, match="before this process was forked"):
            compute()


@kernels
def test_the_probe_reads_single_tokens_too(monkeypatch):
    from prunus.runtime import engine, probe

    config = Qwen2Config(**SIZES)
    probe._probe.cache_clear()
    probe.check(config)
    probe._probe.cache_clear()
    step = engine.Engine.step
    monkeypatch.setattr(engine.Engine, "step", lambda self, token: step(self, token) * 1.01)
    with pytest.raises(NotCovered, match="reading single tokens"):
        probe.check(config)
    probe._probe.cache_clear()


@kernels
def test_what_the_engine_lacks_is_refused_by_name(folders):
    model = prunus.load(folders / "int8")
    with pytest.raises(RecipeError, match="num_beams=4"):
        model.generate(IDS, num_beams=4)
    with pytest.raises(RecipeError, match="without padding"):
        model.generate(IDS, attention_mask=torch.zeros_like(IDS))
    with pytest.raises(RecipeError, match="context"):
        model.generate(IDS, max_new_tokens=5000)
    with pytest.raises(RecipeError, match="output_hidden_states"):
        model(IDS, output_hidden_states=True)


@kernels
@pytest.mark.parametrize("values", ["dense-fp32", "dense-bf16", "dense-int8"])
def test_the_dense_loop_holds_the_same_weights(values, folders, dense):
    assert off(open_model(folders / "pruned", values), dense) < {"dense-fp32": 1e-5}.get(values, 0.05)
    assert off(open_model(folders / "lossless", values), dense) < {"dense-fp32": 1e-5}.get(values, 0.05)


@kernels
def test_an_ordinary_folder_is_packed_on_the_fly(folders, dense):
    assert off(open_model(folders / "pruned"), dense) < 1e-5
    kinds = {type(weight).__name__ for weight in engine_weights(folders / "pruned", "int8").values()}
    assert kinds == {"PackedMatrix", "QuantizedMatrix", "Tensor"}


@kernels
@pytest.mark.parametrize("tokens", [5, 37])
def test_sparse_modules_stand_in_for_linear_ones(tokens, folders, dense):
    model = load_sparse(folders / "lossless", available())
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 35
    assert off(model, dense, IDS[:, :tokens]) < 1e-5


def small(config):
    """A random model that was pruned by hand."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter *= torch.rand(parameter.shape) < 0.4
    return model


SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


GEMMA = Gemma3Config(
    text_config={**SIZES, "head_dim": 8},
    vision_config={
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    },
    mm_tokens_per_image=4,
)  # fmt: skip


@kernels
@pytest.mark.parametrize(
    ("config", "engine"),
    [(Qwen2Config(**SIZES), True), (StableLmConfig(**SIZES), False), (GEMMA, False)],
    ids=["covered", "other", "a part of a larger one"],
)
def test_what_the_engine_does_not_cover_runs_with_sparse_modules_and_a_note(config, engine, tmp_path, caplog):
    model = small(config)
    model.save_pretrained(tmp_path / "dense")
    prunus.export(tmp_path / "dense", tmp_path / "packed", format="packed")
    with caplog.at_level(logging.WARNING, logger="prunus"):
        packed = prunus.load(tmp_path / "packed")
    assert isinstance(packed, PackedModel) == engine
    assert bool(caplog.records) != engine
    if not engine:
        with pytest.raises(NotCovered, match=r"does not cover dense: .* Run it by transformers"):
            open_model(tmp_path / "dense")
    assert off(packed, model) < 1e-5
    assert off(packed, model, IDS[:, :4]) < 1e-5
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(IDS, **how), model.generate(IDS, **how))


def test_without_kernels_pytorch_runs_and_says_so(folders, dense, monkeypatch, caplog):
    monkeypatch.setattr("prunus.runtime.native.available", lambda: None)
    monkeypatch.setattr("prunus.runtime.native.absence", lambda: "no compiler was there")
    with caplog.at_level(logging.WARNING, logger="prunus"):
        model = prunus.load(folders / "lossless")
    assert "no compiler was there" in caplog.text
    assert off(model, dense) < 1e-6


@kernels
@pytest.mark.parametrize(
    ("asked", "engine"),
    [
        ({}, "packed"), ({"dtype": "float32"}, "packed"), ({"dtype": "bfloat16"}, "transformers"),
        ({"dola": Dola("high")}, "transformers"), ({"model": "dense"}, "transformers"), ({"few": True}, "transformers"),
        ({"uncovered": True}, "transformers"), ({"engine": "transformers"}, "transformers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_a_sparse_folder_is_packed_on_the_fly_where_that_can_be(asked, engine, folders, tmp_path, monkeypatch):
    """Not for another dtype, not for DoLa, not a dense model, nor one with few zeros, nor what the engine lacks."""
    asked, folder = dict(asked), tmp_path / "model"
    shutil.copytree(STORIES if asked.pop("model", "") == "dense" else folders / "pruned", folder)
    record = folder / "prunus.json"
    if asked.pop("few", False):
        held = json.loads(record.read_text())
        held["result"]["parameters"]["zeros"] //= 2
        record.write_text(json.dumps(held))
    if asked.pop("uncovered", False):
        monkeypatch.setattr("prunus.packed.running.covers", lambda config: "it is not built like a Llama.")
    found = generate(folder, "Once upon a time", Sampling(max_new_tokens=2), **asked)
    assert found["engine"] == engine


@kernels
def test_generate_on_the_command_line(folders, capsys):
    words = ["--prompt", "Once upon a time", "--max-new-tokens", "12", "--json", "-q"]
    found = []
    for model in (
        [str(folders / "lossless")],
        [str(folders / "pruned")],
        [str(folders / "pruned"), "--engine", "transformers"],
    ):
        assert main(["generate", *model, *words]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [row["engine"] for row in found] == ["packed", "packed", "transformers"]
    assert len({row["text"] for row in found}) == 1
    assert found[0]["tokens"] == 12


@kernels
@pytest.mark.parametrize(
    ("file", "changed", "says"),
    [
        ("config.json", {"hidden_size": 128}, "does not belong to its weights"),
        ("config.json", {"vocab_size": 100}, "does not belong to its weights"),
        ("config.json", {"head_dim": 0}, "cannot build"),
        ("config.json", {"num_key_value_heads": 3}, "the config"),
        ("config.json", {"vocab_size": -5}, "cannot build"),
        ("config.json", {"num_hidden_layers": 4}, "no place for model"),
        ("config.json", {"num_hidden_layers": -1}, "no place for"),
        ("config.json", {"max_position_embeddings": "many"}, "config.json cannot be used"),
        ("config.json", {"prunus_format": ["packed"]}, "does not know"),
        ("generation_config.json", [], "remove it"),
    ],
    ids=lambda value: "-".join(f"{key} {one}" for key, one in value.items()) if isinstance(value, dict) else None,
)
def test_a_folder_whose_json_is_damaged_is_refused(file, changed, says, folders, tmp_path):
    folder = shutil.copytree(folders / "int8", tmp_path / "damaged")
    before = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(before | changed if changed else changed))
    with pytest.raises(PrunusError, match=says):
        prunus.load(folder)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "once \udcff"], "no UTF-8"),
        (["--prompt", "once", "--max-new-tokens", "1000"], "512 positions"),
        (["--prompt", "once", "--dtype", "bfloat16"], "CPU in float32"),
    ],
    ids=["empty prompt", "no text", "too long", "dtype"],
)
def test_bad_generate_is_refused(words, says, folders, capsys):
    assert main(["generate", str(folders / "int8"), *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
