"""Low rank from end to end: exact counts, folders that load anywhere, and what is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunus
import prunus.engine
from families import FAMILIES, save_tiny, tiny_inputs
from prunus.errors import RecipeError
from prunus.evaluation.loading import load_model
from prunus.formats.format import Settings
from prunus.formats.run import export
from prunus.methods import RANKS
from prunus.models.modelling import FILE, ours
from prunus.output import Output
from prunus.recipe import Recipe
from prunus.verify import TOLERANCE, compare

STORIES = Path(__file__).parent / "assets" / "stories260k"
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload in this process; one test below takes a fresh one, in which prunus cannot be imported."""

    def reload(folder: Path, probe: Path, dtype: str, device: str, trust: bool = False, own: bool = False) -> dict:
        found = compare(folder, probe, dtype, device, trust, own)
        assert found["relative_difference"] <= TOLERANCE[dtype]
        assert not found["missing"] and not found["unexpected"]
        return {**found, "tolerance": TOLERANCE[dtype]}

    monkeypatch.setattr("prunus.engine.verify", reload)
    monkeypatch.setattr("prunus.verify.verify", reload)


def recipe(method: str, sparsity: float = 0.3, model: Path = STORIES, **settings: object) -> Recipe:
    text = {"source": "wikitext2", "samples": 4, "length": 64}
    if (model.parent / "inputs.npz").exists():
        text = {"source": str(model.parent / "inputs.npz"), "samples": 4, "length": 32}
    return Recipe(
        model=str(model), calibration=text, prune={"method": method, "sparsity": sparsity, "settings": settings}
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model with 30 % of its blocks' weights gone."""
    out = tmp_path_factory.mktemp("split") / "out"
    prunus.engine.prune(recipe("svd-llm"), out)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("ranks", ["global", "uniform"])
def test_the_share_is_exact_and_the_result_loads(method: str, ranks: str, tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe(method, **{"method.ranks": ranks}), tmp_path / "out")
    sites = result["parameters"]["sites"]
    assert 0 <= result["parameters"]["zeros"] - 0.3 * sites < 64 + 172, "one rank of the largest matrix"
    written = tensors(tmp_path / "out")
    dense = sum(value.numel() for value in tensors(STORIES).values())
    assert sum(value.numel() for value in written.values()) == dense - result["parameters"]["zeros"]
    assert result["shapes"]["parameters"] == dense - result["parameters"]["zeros"]
    found = {m["name"]: m["rank"] for block in result["blocks"] for m in block["matrices"] if "rank" in m}
    assert len(found) == result["shapes"]["split"]
    for name, rank in found.items():
        inner, outer = written[f"{name}.inner.weight"], written[f"{name}.outer.weight"]
        assert inner.shape[0] == outer.shape[1] == rank and f"{name}.weight" not in written
        assert inner.numel() + outer.numel() < outer.shape[0] * inner.shape[1]
    assert result["loads"] == "code" and ours(tmp_path / "out")
    assert result["shapes"]["narrowed_difference"] <= 1e-5
    model = load_model(tmp_path / "out")
    cached = model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=False))


def test_a_block_that_knows_its_inputs_errs_less(tmp_path: Path) -> None:
    how = {"method.ranks": "uniform", "method.last": 4}  # the first block alone: the same inputs for all
    errors = {
        method: prunus.engine.prune(recipe(method, 0.06, **how), tmp_path / method)["blocks"][0]["error"]
        for method in RANKS
    }
    assert errors["svd-llm"] < errors["asvd"] < errors["svd"]


def test_ranks_come_in_the_asked_multiples_and_blocks_are_left_alone(tmp_path: Path) -> None:
    how = {"method.round_to": 4, "method.first": 1, "method.last": 1}
    result = prunus.engine.prune(recipe("svd", 0.2, **how), tmp_path / "out")
    ranks = [m["rank"] for block in result["blocks"] for m in block["matrices"] if "rank" in m]
    assert ranks and not any(rank % 4 for rank in ranks)
    assert [block["sparsity"] == 0 for block in result["blocks"]] == [True, False, False, False, True]
    assert 0.2 <= result["sparsity"]["reached"] < 0.2 + 4 * (64 + 172) / result["parameters"]["sites"]


def test_transformers_alone_loads_it_and_computes_the_same(split: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['prunus'] = None\n"
        "import torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "torch.save(model(torch.arange(3, 23)[None]).logits, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(split), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), prunus.load(split)(TOKENS).logits)


def test_the_factors_compute_what_their_product_does(split: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    stored = tensors(split)
    for name in [name.removesuffix(".inner.weight") for name in stored if name.endswith(".inner.weight")]:
        product = stored[f"{name}.outer.weight"].double() @ stored[f"{name}.inner.weight"].double()
        dense.get_submodule(name).weight.data = product.float()
    with torch.no_grad():
        expected = dense(TOKENS).logits
        assert torch.allclose(prunus.load(split)(TOKENS).logits, expected, atol=1e-4 * float(expected.abs().max()))


def test_a_killed_run_goes_on_to_the_same_bytes(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, block = [], Output.block

    def dies(self, *args, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        return block(self, *args, **kwargs)

    monkeypatch.setattr(Output, "block", dies)
    with pytest.raises(KeyboardInterrupt):
        prunus.engine.prune(recipe("svd-llm"), tmp_path / "killed")
    monkeypatch.setattr(Output, "block", block)
    assert prunus.engine.prune(recipe("svd-llm"), tmp_path / "killed")["resumed_blocks"] == 2
    whole, killed = tensors(split), tensors(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_portable_multiplies_the_factors_back(dtype: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "dense")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (STORIES / file).is_file():
            (tmp_path / "dense" / file).write_bytes((STORIES / file).read_bytes())
    prunus.engine.prune(recipe("svd", model=tmp_path / "dense"), tmp_path / "split")
    result = export(tmp_path / "split", tmp_path / "stock", "hf", Settings(portable=True))
    assert result["class"] == "LlamaForCausalLM" and result["stock"]
    assert any("were multiplied" in note for note in result["notes"])
    assert not (tmp_path / "stock" / FILE).exists()
    stock, dense = tensors(tmp_path / "stock"), tensors(tmp_path / "dense")
    assert {name: (v.shape, v.dtype) for name, v in stock.items()} == {
        name: (v.shape, v.dtype) for name, v in dense.items()
    }
    back, _ = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True, dtype=torch.float32)
    with torch.no_grad():
        found, expected = back(TOKENS).logits, prunus.load(tmp_path / "split")(TOKENS).logits
    assert float((found - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


def test_an_exported_folder_is_the_same_one(split: Path, tmp_path: Path) -> None:
    result = export(split, tmp_path / "hf", "hf")
    assert not result["stock"] and ours(tmp_path / "hf")
    assert torch.equal(prunus.load(tmp_path / "hf")(TOKENS).logits, prunus.load(split)(TOKENS).logits)


def test_llama_cpp_is_refused_with_the_way_out(split: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"product of two.*--format hf --portable"):
        export(split, tmp_path / "model.gguf", "gguf")


def test_factors_can_be_made_sparse_but_not_split_again(split: Path, tmp_path: Path) -> None:
    for method in ("svd", "flap", "shortgpt"):
        with pytest.raises(RecipeError, match="product of two matrices already"):
            prunus.engine.prune(recipe(method, model=split), tmp_path / "again")
    result = prunus.engine.prune(recipe("wanda", 0.5, model=split), tmp_path / "sparse")
    assert result["sparsity"]["reached"] == pytest.approx(0.5, abs=0.02)
    stored = tensors(tmp_path / "sparse")
    factor = next(value for name, value in stored.items() if name.endswith("inner.weight"))
    assert 0.4 < float((factor == 0).float().mean()) < 0.6
    assert ours(tmp_path / "sparse")
    export(tmp_path / "sparse", tmp_path / "packed", "packed")
    with torch.no_grad():
        found, expected = (prunus.load(tmp_path / name)(TOKENS).logits for name in ("packed", "sparse"))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    size = {
        name: sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        for name in ("packed", "sparse")
    }
    assert size["packed"] < 0.8 * size["sparse"]


def test_a_share_of_almost_nothing_splits_one_matrix(tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe("svd", 1e-5), tmp_path / "out")
    assert result["shapes"]["split"] == 1
    assert result["parameters"]["zeros"] < 64 + 172


def test_no_share_changes_nothing(tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe("svd", 0.0), tmp_path / "out")
    assert result["loads"] == "transformers" and result["shapes"]["split"] == 0
    dense, written = tensors(STORIES), tensors(tmp_path / "out")
    assert dense.keys() == written.keys() and all(torch.equal(dense[name], written[name]) for name in dense)


# Families with transposed storage, biases, experts in one tensor, no language head; clip has two towers.
CASES = {"gpt2": "code", "opt": "code", "qwen3_moe": "code", "bert": "code", "clip": "prunus"}


@pytest.mark.parametrize("family", CASES)
def test_other_families_load_too(family: str, tmp_path: Path) -> None:
    model = save_tiny(FAMILIES[family], tmp_path / "dense")
    inputs = {name: value.numpy() for name, value in tiny_inputs(FAMILIES[family], samples=4, length=32).items()}
    np.savez(tmp_path / "inputs.npz", **inputs)
    result = prunus.engine.prune(recipe("svd-llm", 0.1, model), tmp_path / "out")
    assert result["loads"] == CASES[family]
    assert 0.1 <= result["sparsity"]["reached"] < 0.15
    dense, written = tensors(model), tensors(tmp_path / "out")
    biases = sum(name.endswith("bias") for name in dense)
    assert sum(name.endswith("bias") for name in written) == biases
    experts = [name for name in dense if ".experts." in name]
    assert all(torch.equal(dense[name], written[name]) for name in experts)


@pytest.mark.parametrize(
    "sparsity,settings,words",
    [
        (0.99, {}, "At rank 1, the lowest, .* weights of 35 matrices go"),
        (0.3, {"method.round_to": 64}, "At rank 64"),
        (0.3, {"method.round_to": 0}, "at least 1"),
        (0.3, {"method.first": -1}, "at least 0"),
        (0.3, {"method.first": 5}, "No matrix is left to split"),
        (0.01, {"method.last": 6}, "No matrix is left to split"),
        (0.3, {"method.ranks": "local"}, "'global' or 'uniform'"),
        (0.3, {"score.alpha": 0.5}, "no setting 'alpha'"),
        (0.3, {"score.damp": -1}, "at least 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(sparsity, settings, words, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        prunus.engine.prune(recipe("svd-llm", sparsity, **settings), tmp_path / "out")
    assert not list(tmp_path.glob("*"))


def test_a_record_of_an_older_folder_still_makes_the_file_it_made() -> None:
    """The modelling file without ranks is byte for byte what it was before there were any."""
    from prunus.models.modelling import describe, source

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    plain = source(describe(config, "LlamaConfig", {"blocks": "model.layers", "biases": []}, {}))
    split = source(describe(config, "LlamaConfig", {"blocks": "model.layers", "biases": [], "ranks": {"a": 1}}, {}))
    assert hashlib.sha256(plain.encode()).hexdigest() == (
        "bd3c584975ae35ab6138ccb5cf3ede57eb147edeaed8ad95b65e495d79b9a33c"
    )
    assert "rank" not in plain and "rank" in split
    compile(split, "split", "exec")
