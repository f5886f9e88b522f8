"""Every family: streamed = resident bit for bit, sparsity reached, and the saved folder loads in stock transformers.

The rows that these tests see are what `docs/families.md` shows (`make docs` runs them with `PRUNUS_FAMILIES` set).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from families import FAMILIES, save_tiny, tiny_inputs
from prunus.distributed import Processes
from prunus.engine import prune
from prunus.errors import ModelError
from prunus.job import prepare
from prunus.models.checkpoint import Checkpoint
from prunus.models.weights import Weights
from prunus.recipe import Recipe
from prunus.statistics import InputNorm
from prunus.verify import TOLERANCE, compare

# Families that pass state between blocks, share weights between them, or have no list of blocks: refused with a
# sentence, never pruned wrongly. The words must appear in it.
REFUSED = {
    "blt": "outside of any block",
    "cpmant": "--blocks",
    "ctrl": "--blocks",
    "gemma4_text": "outside of any block",
    "glm_moe_dsa": "more from the blocks before",
    "gpt_neox_japanese": "--blocks",
    "hrm_text": "more than once",
    "hy_v4": "more from the blocks before",
    "inkling2_text": "more from the blocks before",
    "openai-gpt": "--blocks",
    "reformer": "--blocks",
    "xlm": "--blocks",
    "xlnet": "--blocks",
    "zamba": "share the weights",
    "zamba2": "share the weights",
}


def recipe_for(folder: Path, family: str, **prune_options: object) -> Recipe:
    inputs = {name: value.numpy() for name, value in tiny_inputs(FAMILIES[family], samples=4, length=32).items()}
    np.savez(folder / "inputs.npz", **inputs)
    return Recipe(
        model=str(folder / "dense"),
        calibration={"source": str(folder / "inputs.npz"), "samples": 4, "length": 32},
        prune={"method": "wanda", "sparsity": 0.5, **prune_options},
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload in this process: a fresh one for each of 150 families would take an hour. One test below uses it."""

    def reload(folder: Path, probe: Path, dtype: str, device: str, trust_remote_code: bool, own: bool) -> dict:
        found = compare(folder, probe, dtype, device, trust_remote_code, own)
        assert found["relative_difference"] <= TOLERANCE[dtype]
        assert not found["missing"]
        return {**found, "tolerance": TOLERANCE[dtype]}

    monkeypatch.setattr("prunus.engine.verify", reload)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def record(family: str, row: dict) -> None:
    """Add a row to the file that the docs are generated from, when asked to."""
    target = os.environ.get("PRUNUS_FAMILIES")
    if target:
        path = Path(target)
        rows = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**rows, family: row}, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
def test_streamed_equals_resident_and_the_result_loads(
    family: str, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(FAMILIES[family], tmp_path / "dense")
    recipe = recipe_for(tmp_path, family)
    result = prune(recipe, tmp_path / "streamed")
    # Resident: nothing is ever dropped, so every block keeps its (pruned) weights in memory.
    monkeypatch.setattr(Weights, "drop", lambda self, module: None)
    prune(recipe, tmp_path / "resident")
    streamed, resident = weights_of(tmp_path / "streamed"), weights_of(tmp_path / "resident")
    dense = weights_of(tmp_path / "dense")
    assert streamed.keys() == resident.keys() == dense.keys()
    for name, tensor in streamed.items():
        assert tensor.dtype == dense[name].dtype, name
        assert tensor.numpy().tobytes() == resident[name].numpy().tobytes(), name
    for block in result["blocks"]:
        for matrix in block["matrices"]:
            rows, columns = matrix["shape"]
            assert matrix["zeros"] == rows * (columns // 2), matrix["name"]
    record(family, {
        "blocks": len(result["blocks"]), "matrices": result["sites"], "sparsity": result["sparsity"]["reached"],
        "streamed_equals_resident": True, "reload_difference": result["verify"]["relative_difference"],
        "warnings": result["warnings"],
    })  # fmt: skip


@pytest.mark.parametrize("family", list(REFUSED))
def test_a_family_that_cannot_be_done_is_refused_with_a_sentence(family: str, tmp_path: Path) -> None:
    save_tiny(FAMILIES[family], tmp_path / "dense")
    with pytest.raises(ModelError) as caught:
        prune(recipe_for(tmp_path, family), tmp_path / "out")
    assert REFUSED[family] in str(caught.value)
    assert not (tmp_path / "out").exists()
    record(family, {"refused": str(caught.value).split(";")[0]})


@pytest.mark.parametrize("family", ["ctrl", "openai-gpt", "gpt_neox_japanese", "xlnet", "cpmant"])
def test_a_legacy_family_works_or_is_refused_once_its_blocks_are_named(
    family: str, tmp_path: Path, in_process: None
) -> None:
    lists = {"ctrl": "transformer.h", "openai-gpt": "transformer.h", "gpt_neox_japanese": "gpt_neox_japanese.layers",
             "xlnet": "transformer.layer", "cpmant": "cpmant.encoder.layers"}  # fmt: skip
    save_tiny(FAMILIES[family], tmp_path / "dense")
    recipe = recipe_for(tmp_path, family, blocks=lists[family])
    try:
        result = prune(recipe, tmp_path / "out")
    except ModelError as error:
        record(family, {"refused": str(error).split(";")[0]})
        return
    assert result["sparsity"]["reached"] == pytest.approx(0.5, abs=0.01)


def test_the_fresh_process_sees_a_checkpoint_that_computes_something_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from prunus.errors import FormatError
    from prunus.verify import verify

    save_tiny(FAMILIES["llama"], tmp_path / "dense")
    inputs = tiny_inputs(FAMILIES["llama"], samples=1, length=8)
    logits = torch.zeros(1, 8, 128)
    save_file({**{f"input.{name}": value for name, value in inputs.items()}, "logits": logits}, tmp_path / "probe")
    with pytest.raises(FormatError, match="computes other logits"):
        verify(tmp_path / "dense", tmp_path / "probe", "float32", "cpu")


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_model_that_does_not_fit_is_verified_from_disk(family: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_tiny(FAMILIES[family], tmp_path / "dense")
    inputs = tiny_inputs(FAMILIES[family], samples=1, length=8)
    save_file({**{f"input.{k}": v for k, v in inputs.items()}, "logits": torch.zeros(1, 8, 128)}, tmp_path / "probe")
    whole = compare(tmp_path / "dense", tmp_path / "probe", "float32", "cpu", False)
    offloaded = compare(tmp_path / "dense", tmp_path / "probe", "float32", "cpu", False, memory=30_000)
    assert offloaded["max_difference"] == pytest.approx(whole["max_difference"], rel=1e-5)


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "gemma3_text", "bloom", "falcon", "opt", "phi3", "gpt_neox", "qwen3_moe", "rwkv", "clip"],
)
def test_statistics_are_those_that_hooks_on_the_stock_model_see(family: str, tmp_path: Path) -> None:
    """An oracle that shares nothing with the stream: the resident stock model, plain hooks, one sum per matrix."""
    save_tiny(FAMILIES[family], tmp_path / "dense")
    inputs = tiny_inputs(FAMILIES[family], samples=4, length=32)
    job = prepare(recipe_for(tmp_path, family), tmp_path / "out", overwrite=False, processes=Processes(), warnings=[])
    ours = {
        name: stats[InputNorm].mean_square
        for step in job.stream.walk(job.batches, frozenset({InputNorm}))
        for name, stats in step.stats.items()
    }
    stock = type(job.stream.model).from_pretrained(tmp_path / "dense").eval()
    theirs: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            flat = args[0].detach().reshape(-1, args[0].shape[-1])
            theirs[name] = theirs.get(name, 0) + flat.square().sum(0)

        return hook

    for name, module in stock.named_modules():
        if name in ours:
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        stock(**inputs, **({} if family == "clip" else {"use_cache": False}))
    assert theirs.keys() <= ours.keys()
    assert len(theirs) > 5
    for name, total in theirs.items():
        torch.testing.assert_close(ours[name], total / 4, rtol=1e-4, atol=1e-6)


def test_matrices_that_the_text_never_reaches_stay_dense(tmp_path: Path, in_process: None) -> None:
    save_tiny(FAMILIES["mamba"], tmp_path / "dense")
    result = prune(recipe_for(tmp_path, "mamba"), tmp_path / "out")
    idle = [name for block in result["blocks"] for name in block["idle"]]
    assert idle
    assert all(name.endswith("dt_proj") for name in idle)
    assert any("never called" in warning for warning in result["warnings"])


def test_all_shards_of_a_result_are_whole(tmp_path: Path, in_process: None) -> None:
    save_tiny(FAMILIES["mixtral"], tmp_path / "dense")
    prune(recipe_for(tmp_path, "mixtral"), tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").tensors.keys() == Checkpoint.open(tmp_path / "dense").tensors.keys()
