"""Smaller shapes from end to end, on a real small model and on tiny families."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunus
import prunus.engine
from families import FAMILIES, save_tiny
from prunus.distributed import Processes
from prunus.errors import ModelError, RecipeError
from prunus.evaluation.loading import load_model
from prunus.job import prepare
from prunus.methods import DEPTH, WIDTHS
from prunus.methods.widths.structures import uniform_counts
from prunus.output import Output
from prunus.progress import Silent
from prunus.recipe import PrunePart, Recipe
from prunus.sites import Width
from prunus.survey import Survey
from prunus.verify import TOLERANCE, compare

STORIES = Path(__file__).parent / "assets" / "stories260k"
# Blocks left alone at both ends, where the published numbers leave none of five.
NEAR = {"llm-pruner", "shortened-ppl", "shortened-taylor"}


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload in this process; `test_cli` uses a fresh one."""

    def reload(folder: Path, probe: Path, dtype: str, device: str, trust: bool, own: bool) -> dict:
        found = compare(folder, probe, dtype, device, trust, own)
        assert found["relative_difference"] <= TOLERANCE[dtype]
        assert not found["missing"]
        assert not found["unexpected"]
        return {**found, "tolerance": TOLERANCE[dtype]}

    monkeypatch.setattr("prunus.engine.verify", reload)


def recipe(method: str, sparsity: float = 0.4, model: Path = STORIES, **settings: object) -> Recipe:
    near = {"method.first": 1, "method.last": 1} if method in NEAR else {}
    text = {"source": "wikitext2", "samples": 4, "length": 64}
    if (model.parent / "ids.npy").is_file():
        text = {"source": str(model.parent / "ids.npy"), "samples": 4, "length": 32}
    return Recipe(
        model=str(model), calibration=text, prune={"method": method, "sparsity": sparsity, "settings": near | settings}
    )


@pytest.fixture
def tiny(tmp_path: Path):
    """A tiny family on disk, with calibration ids beside it."""
    import numpy as np

    def make(name: str) -> Path:
        np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(8, 128, (4, 32), dtype=np.int32))
        return save_tiny(FAMILIES[name], tmp_path / "dense")

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("method", [*WIDTHS, *DEPTH])
def test_every_method_reaches_its_share_and_its_result_loads(method: str, tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe(method, 0.25 if method == "last-quarter" else 0.4), tmp_path / "out")
    wanted = 0.25 if method == "last-quarter" else 0.4
    # A block is a fifth; a neuron of each of five blocks half a per cent.
    unit = 0.1 if method in DEPTH else 0.035
    assert abs(result["sparsity"]["reached"] - wanted) < unit
    written = tensors(tmp_path / "out")
    assert result["shapes"]["parameters"] == sum(value.numel() for value in written.values())
    dense = sum(value.numel() for value in tensors(STORIES).values())
    norms = 2 * 64 * len(result["shapes"]["blocks"])
    made = sum(value.numel() for name, value in written.items() if name.endswith(".bias"))
    assert result["shapes"]["parameters"] == dense - result["parameters"]["zeros"] - norms + made
    assert result["loads"] == ("transformers" if method in DEPTH else result["loads"])
    assert result["shapes"]["narrowed_difference"] <= 1e-5
    model = load_model(tmp_path / "out")
    ids = torch.arange(10, 30)[None]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_a_uniform_width_is_a_plain_configuration(tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe("magnitude-sp", 0.2), tmp_path / "out")
    assert result["loads"] == "transformers"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    widths = {value.shape[0] for name, value in tensors(tmp_path / "out").items() if "gate_proj" in name}
    assert widths == {config["intermediate_size"]}
    assert config["num_attention_heads"] == 8  # int(0.2 · 4 groups) = 0 heads go
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_uniform_heads_and_biases_are_a_plain_configuration_where_the_class_has_switches(tmp_path: Path) -> None:
    how = {"method.structure": "UL-UM"}
    result = prunus.engine.prune(recipe("flap", 0.5, **how), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert result["loads"] == "transformers"
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert config["attention_bias"] and config["mlp_bias"]
    stored = tensors(tmp_path / "out")
    assert stored["model.layers.0.mlp.down_proj.bias"].any()
    assert not stored["model.layers.0.mlp.up_proj.bias"].any()


def test_widths_of_their_own_bring_their_modelling_file(tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe("flap"), tmp_path / "out")
    assert result["loads"] == "code"
    model = load_model(tmp_path / "out")
    widths = [block.mlp.up_proj.out_features for block in model.model.layers]
    assert len(set(widths)) > 1
    assert all(
        block.mlp.down_proj.bias is not None for block in model.model.layers if block.mlp.up_proj.out_features < 172
    )


def test_a_bias_makes_up_for_what_is_constant(tmp_path: Path) -> None:
    errors = {}
    for bias in (True, False):
        result = prunus.engine.prune(recipe("flap", **{"method.bias": bias}), tmp_path / f"out{bias}")
        errors[bias] = max(block["error"] for block in result["blocks"])
        assert result["shapes"]["biases"] == (0 if not bias else result["shapes"]["biases"])
    assert errors[True] < errors[False]


def test_a_refitted_consumer_errs_less_than_one_that_is_only_cut(tmp_path: Path) -> None:
    cut = prunus.engine.prune(recipe("wanda-sp", 0.2), tmp_path / "cut")
    refitted = prunus.engine.prune(recipe("obs-sp", 0.2, **{"method.structure": "uniform"}), tmp_path / "refitted")
    assert cut["sparsity"] == refitted["sparsity"]
    assert refitted["blocks"][0]["error"] < cut["blocks"][0]["error"]


@pytest.mark.parametrize("method", ["obs-sp", "sleb"])
def test_a_killed_run_goes_on_to_the_same_bytes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prunus.engine.prune(recipe(method), tmp_path / "whole")
    written, block = [], Output.block

    def dies(self, *args, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        return block(self, *args, **kwargs)

    monkeypatch.setattr(Output, "block", dies)
    with pytest.raises(KeyboardInterrupt):
        prunus.engine.prune(recipe(method), tmp_path / "killed")
    monkeypatch.setattr(Output, "block", block)
    result = prunus.engine.prune(recipe(method), tmp_path / "killed")
    assert result["resumed_blocks"] == 2
    whole, killed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "gpt2", "gpt_neox", "opt", "qwen3_moe"])
def test_lists_with_an_entry_for_each_block_follow_when_blocks_go(family: str, tiny, tmp_path: Path) -> None:
    model = tiny(family)
    result = prunus.engine.prune(recipe("angular", 0.34, model), tmp_path / "out")
    assert result["loads"] == "transformers"
    before = json.loads((model / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    (gone,) = {int(name.rpartition(".")[2]) for name in result["shapes"]["blocks"]}
    if "layer_types" in before:
        kinds = before["layer_types"]
        assert after["layer_types"] == kinds[:gone] + kinds[gone + 1 :]
    depth = next(after[name] for name in ("num_hidden_layers", "n_layer") if name in after)
    assert depth == next(before[name] for name in ("num_hidden_layers", "n_layer") if name in before) - 1


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "qwen2", "gpt_neox"])
def test_uniform_cuts_of_other_families_load(family: str, tiny, tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe("wanda-sp", 0.5, tiny(family)), tmp_path / "out")
    assert abs(result["sparsity"]["reached"] - 0.5) < 0.03
    # GPT-NeoX takes the size of a head from the number of heads, so no class holds fewer.
    assert result["loads"] == ("prunus" if family == "gpt_neox" else "transformers")
    if result["loads"] == "prunus":
        again = prunus.engine.prune(recipe("wanda-sp", 0.3, tmp_path / "out"), tmp_path / "again")
        assert again["loads"] == "prunus" and abs(again["sparsity"]["reached"] - 0.3) < 0.05
    heads = next(block for block in result["blocks"][0]["matrices"] if block["name"].endswith(("o_proj", "dense")))
    assert heads["kept_shape"][1] == heads["shape"][1] // 2


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "olmo2"])
def test_heads_that_cannot_go_are_refused_with_the_reason_and_neurons_still_can(
    family: str, tiny, tmp_path: Path
) -> None:
    model = tiny(family)
    with pytest.raises(ModelError, match=r"heads of .* cannot be removed .*method.kinds=neurons"):
        prunus.engine.prune(recipe("flap", 0.2, model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = prunus.engine.prune(recipe("wanda-sp", 0.2, model, **{"method.kinds": "neurons"}), tmp_path / "out")
    assert abs(result["sparsity"]["reached"] - 0.2) < 0.02
    assert result["loads"] == "transformers"


@pytest.mark.parametrize(
    "method,sparsity,settings,words",
    [
        ("flap", 0.99, {}, "at most .* weights can go, so ask for 0 to 0.9"),
        ("flap", 0.5, {"method.structure": "AL-MM", "method.heads": 99}, "0 to 15 groups of heads"),
        ("flap", 0.5, {"method.heads": 2}, "UL-MM and AL-MM only"),
        ("flap", 0.5, {"method.heads": -1}, "at least 0"),
        ("flap", 0.5, {"method.first": 5}, "first 5 and last 0 blocks left alone"),
        ("flap", 0.5, {"score.metric": "WIV"}, "'WIFV', 'IFV' or 'WIFN'"),
        ("flap", 0.5, {"score.metrik": "WIFV"}, "Did you mean 'metric'"),
        ("flap", 0.5, {"update.damp": 0.1}, "axis.field"),
        ("obs-sp", 0.5, {"method.rounds": 0}, "at least 1"),
        ("shortgpt", 0.95, {}, "at most 4 can"),
        ("top", 0.5, {"method.keep": 9}, "the model has 5 blocks"),
        ("flap", 0.5, {"method.last": 7}, "first 0 and last 7 blocks left alone.*ask for 0 to 0"),
        ("obs-sp", 0.5, {"method.last": 7}, "first 0 and last 7 blocks left alone"),
        ("shortgpt", 0.4, {"method.last": 7}, "at most 0 can"),
        ("last-quarter", 0.4, {}, "removes 0.25 of the blocks by its settings, whatever --sparsity 0.4 says"),
        ("top", 0.4, {"method.keep": 4}, "removes 0.2 of the blocks by its settings"),
        ("last-quarter", 0.5, {"method.share": 1}, r"in \[0, 1\)"),
        ("sleb", 0.8, {}, "keeps the first and the last"),
        ("sleb", 0.4, {"ranking.samples": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(method, sparsity, settings, words, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        prunus.engine.prune(recipe(method, sparsity, **settings), tmp_path / "out")
    assert not list(tmp_path.glob("*")), "nothing is left behind"


@pytest.mark.parametrize("part", ["metric", "update", "pattern", "allocation"])
def test_parts_of_other_methods_are_refused(part: str) -> None:
    name = {"metric": "wanda", "update": "obs", "pattern": "2:4", "allocation": "owl"}[part]
    with pytest.raises(RecipeError, match=f"--{part} {name} has no meaning with flap"):
        Recipe(model="m", prune={"method": "flap", part: name}).build()


@pytest.mark.parametrize("budget", [{"params": "200K"}, {"size": "800K"}, {"speedup": 1.2}])
def test_a_budget_that_the_method_s_settings_contradict_is_refused(budget: dict, tmp_path: Path) -> None:
    asked = recipe("last-quarter", 0.25).model_copy(update={"prune": PrunePart(method="last-quarter", **budget)})
    with pytest.raises(RecipeError, match="by its settings, whatever --"):
        prunus.engine.prune(asked, tmp_path / "out")


def test_too_little_text_for_a_hessian_without_damping_is_refused_with_the_cure(tmp_path: Path) -> None:
    asked = recipe("obs-sp", 0.2, **{"method.damp": 0.0})
    asked = asked.model_copy(update={"calibration": asked.calibration.model_copy(update={"samples": 1})})
    with pytest.raises(RecipeError, match=r"not positive definite with method.damp 0.*method.damp=0.01"):
        prunus.engine.prune(asked, tmp_path / "out")
    assert not list(tmp_path.glob("*"))


def test_what_depends_on_the_order_of_sequences_is_refused_for_several_processes(tmp_path: Path) -> None:
    asked = recipe("flap", **{"score.compat": "reference"})
    with pytest.raises(RecipeError, match="order of the sequences, which 2 processes"):
        prepare(asked, tmp_path / "out", overwrite=False, processes=Processes(0, 2), warnings=[])


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose blocks have sizes of their own, and biases."""
    folder = tmp_path_factory.mktemp("unequal") / "flap"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("prunus.engine.verify", lambda *_: {"relative_difference": 0.0, "tolerance": 1.0})
        result = prunus.engine.prune(recipe("flap", 0.3), folder)
    assert result["loads"] == "code"
    return folder


@pytest.mark.parametrize("method", ["flap", "obs-sp", "wanda"])
def test_unequal_blocks_can_be_pruned_again(method: str, unequal: Path, tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe(method, 0.3, unequal), tmp_path / "again")
    assert result["loads"] == "code"
    assert abs(result["sparsity"]["reached"] - 0.3) < 0.02
    assert result["verify"]["relative_difference"] < 1e-5
    before, after = tensors(unequal), tensors(tmp_path / "again")
    size = sum(value.numel() if method != "wanda" else int(value.count_nonzero()) for value in after.values())
    assert size < 0.85 * sum(value.numel() for value in before.values())


def test_unequal_blocks_can_go(unequal: Path, tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe("shortgpt", 0.4, unequal), tmp_path / "out")
    (one, other) = (int(name.rpartition(".")[2]) for name in result["shapes"]["blocks"])
    before, after = load_model(unequal), load_model(tmp_path / "out")
    left = [block for place, block in enumerate(before.model.layers) if place not in (one, other)]
    assert len(after.model.layers) == 3
    for old, new in zip(left, after.model.layers, strict=True):
        assert all(torch.equal(old.state_dict()[name], value) for name, value in new.state_dict().items())


def test_unequal_blocks_recover(unequal: Path, tmp_path: Path) -> None:
    result = prunus.recover(
        unequal,
        tmp_path / "out",
        method="biases",
        allow_dense=True,
        steps=2,
        samples=8,
        length=32,
        heldout=2,
        dtype="float32",
    )
    before, after = load_model(unequal), load_model(tmp_path / "out")
    assert {name: value.shape for name, value in before.state_dict().items()} == {
        name: value.shape for name, value in after.state_dict().items()
    }
    assert result


@pytest.mark.parametrize("method,sparsity", [("flap", 0.5), ("obs-sp", 0.3)])
def test_portable_gives_all_blocks_one_shape_of_a_stock_class(method: str, sparsity: float, tmp_path: Path) -> None:
    asked = recipe(method, sparsity)
    asked = asked.model_copy(update={"prune": asked.prune.model_copy(update={"portable": True})})
    result = prunus.engine.prune(asked, tmp_path / "out")
    assert result["loads"] == "transformers"
    assert abs(result["sparsity"]["reached"] - sparsity) < 0.005
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = tensors(tmp_path / "out")
    for part in ("o_proj.weight", "down_proj.weight"):
        assert len({value.shape for name, value in written.items() if name.endswith(part)}) == 1
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_survey_asks_about_blocks_of_which_nothing_may_be_pruned_too() -> None:
    written: dict[str, dict[str, torch.Tensor]] = {}
    blocks = [SimpleNamespace(name=name, slots=slots, infos=[]) for name, slots in (("a", []), ("b", [1]), ("c", []))]

    def walk(batches, needs, finished):
        yield from (SimpleNamespace(block=block, stats={}) for block in blocks if finished(block) is None)

    weights = SimpleNamespace(checkpoint=object())
    stream = SimpleNamespace(blocks=blocks, walk=walk, weights=weights, processes=SimpleNamespace(rank=0))
    work = SimpleNamespace(read_tensors=written.get, write_tensors=written.__setitem__)
    evidence = SimpleNamespace(of=lambda step, needs: {})

    def visited() -> tuple[dict[str, torch.Tensor], list[str]]:
        asked: list[str] = []

        def ask(step, stats) -> torch.Tensor:
            asked.append(step.block.name)
            return torch.tensor([ord(step.block.name)])

        survey = Survey(stream, [], work, Silent(), evidence)  # type: ignore[arg-type]
        return survey.visit(ask), asked

    first, asked = visited()
    assert asked == ["a", "b", "c"] and {name: chr(int(value)) for name, value in first.items()} == {
        name: name for name in "abc"
    }
    again, asked = visited()
    assert asked == [] and again == first


def test_a_block_that_is_ignored_as_a_whole_is_not_dropped() -> None:
    blocks = [
        SimpleNamespace(name=f"l.{number}", tower="l", infos=[], slots=slots, ignored={"w"})
        for number, slots in enumerate(([1], []))
    ]
    with pytest.raises(RecipeError, match=r"--ignore leaves no matrix of l\.1"):
        DEPTH["top"].plan(SimpleNamespace(blocks=blocks), 0.5)  # type: ignore[arg-type]


def test_portable_takes_the_nearest_number_of_heads_that_a_class_allows() -> None:
    size = {"a": 32 * 24, "m": 96}
    widths = [
        Width(
            f"{kind}{block}",
            str(block),
            "heads" if kind == "a" else "neurons",
            groups,
            (),
            (),
            torch.full((groups,), size[kind]),
        )
        for block in (0, 1)
        for kind, groups in (("a", 8), ("m", 200))
    ]
    total = sum(int(width.weights.sum()) for width in widths)

    def refusal(heads: int | None) -> str:
        return "" if heads in (2, 4, 8) else f"{heads} is odd"

    counts = uniform_counts(widths, total // 3, 1 / 3, 0, "UL-UM", "exact", refusal)
    assert counts["a0"] == counts["a1"] == 8, "of 4 and 8, equally near to 6, the larger"
    gone = sum((width.groups - counts[width.name]) * int(width.weights[0]) for width in widths)
    assert abs(gone - total // 3) <= 2 * 96
    with pytest.raises(RecipeError, match=r"no stock class holds 7 of 8 groups.*7 is odd"):
        uniform_counts(widths, total // 3, 1 / 3, 2, "UL-MM", "exact", refusal)


@pytest.mark.parametrize(
    "method,settings,words",
    [
        ("llm-pruner", {}, "the first 1 and last 1 are left alone.*method.first=0"),
        ("wanda", {}, "only sets weights to zero"),
    ],
)
def test_portable_that_cannot_be_is_refused_with_what_can(method, settings, words, tmp_path: Path) -> None:
    asked = recipe(method, 0.3, **settings)
    asked = asked.model_copy(update={"prune": asked.prune.model_copy(update={"portable": True})})
    with pytest.raises(RecipeError, match=words):
        prunus.engine.prune(asked, tmp_path / "out")
    assert not list(tmp_path.glob("*"))


def test_portable_refuses_biases_and_blocks_for_which_there_is_no_class(tiny, unequal: Path, tmp_path: Path) -> None:
    for model, words in (
        (unequal, "differ in shape already. prunus export"),
        (tiny("qwen3"), "no stock class holds .*method.bias=false.*trust_remote_code=True"),
    ):
        asked = recipe("flap", 0.3, model)
        asked = asked.model_copy(update={"prune": asked.prune.model_copy(update={"portable": True})})
        with pytest.raises(RecipeError, match=words):
            prunus.engine.prune(asked, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_top_keeps_the_first_blocks_and_their_weights(tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe("top", 0.5, **{"method.keep": 2}), tmp_path / "out")
    assert result["shapes"]["blocks"] == [f"model.layers.{number}" for number in (2, 3, 4)]
    dense, kept = tensors(STORIES), tensors(tmp_path / "out")
    assert all(torch.equal(dense[name], value) for name, value in kept.items())
    assert len(kept) == len([name for name in dense if not any(f"layers.{n}." in name for n in (2, 3, 4))])


def test_sleb_begins_with_the_block_that_single_losses_name(tmp_path: Path) -> None:
    one = prunus.engine.prune(recipe("sleb", 0.2, **{"ranking.samples": 4}), tmp_path / "sleb")
    other = prunus.engine.prune(
        recipe("shortened-ppl", 0.2, **{"ranking.samples": 4, "method.first": 1, "method.last": 1}), tmp_path / "ppl"
    )
    assert one["shapes"]["blocks"] == other["shapes"]["blocks"]
