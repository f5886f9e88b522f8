"""Models for images and text: both towers are pruned in running order; budgets go across them or within each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from families import FAMILIES, save_tiny, tiny_inputs
from prunus.engine import prune
from prunus.errors import RecipeError
from prunus.recipe import Recipe

IMAGE = 7


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of three blocks in each tower, with four images and texts as calibration."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1, image_seq_length=4
    )
    LlavaForConditionalGeneration(config).eval().save_pretrained(folder / "dense")
    draw = np.random.default_rng(0)
    ids = draw.integers(10, 128, size=(4, 24))
    ids[:, 2:6] = IMAGE
    np.savez(folder / "inputs.npz", input_ids=ids, pixel_values=draw.normal(size=(4, 3, 16, 16)).astype(np.float32))
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    save_tiny(FAMILIES["clip"], tmp_path / "dense")
    inputs = tiny_inputs(FAMILIES["clip"], samples=4, length=16)
    np.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    return tmp_path


def result_of(folder: Path, out: Path, **options: object) -> dict:
    text = {"source": str(folder / "inputs.npz")}
    recipe = Recipe(model=str(folder / "dense"), calibration=text, prune=dict(options))
    return prune(recipe, out)


def shares(result: dict) -> dict[str, float]:
    """Tower → sparsity asked of its matrices together."""
    towers: dict[str, list[tuple[float, int]]] = {}
    for block in result["blocks"]:
        for matrix in block["matrices"]:
            size = matrix["shape"][0] * matrix["shape"][1]
            towers.setdefault(block["name"].rpartition(".")[0], []).append((matrix["wanted"] * size, size))
    return {name: sum(lost for lost, _ in own) / sum(size for _, size in own) for name, own in towers.items()}


def test_what_stock_transformers_computes_is_what_the_run_computed(llava: Path, tmp_path: Path) -> None:
    result = result_of(llava, tmp_path / "out", method="sparsegpt")
    assert list(shares(result)) == ["model.vision_tower.encoder.layers", "model.language_model.layers"]
    assert result["verify"]["relative_difference"] <= 1e-5
    assert result["sparsity"]["reached"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("towers", ["together", "apart"])
@pytest.mark.parametrize("kind", ["llava", "clip"])
def test_ecoflap_divides_over_towers_or_within_them(
    kind: str, towers: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    settings = {"allocation.towers": towers, "allocation.samples": 4, "allocation.ceiling": 0.9}
    result = result_of(folder, tmp_path / "out", method="magnitude", allocation="ecoflap", settings=settings)
    found = shares(result)
    assert len(found) == 2
    assert (max(found.values()) - min(found.values()) < 1e-3) == (towers == "apart")
    assert len({round(block["wanted"], 3) for block in result["blocks"]}) > 2


def test_without_images_the_language_tower_is_pruned_and_the_other_named(llava: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(10, 128, size=(4, 24)))
    recipe = Recipe(model=str(llava / "dense"), calibration={"source": str(tmp_path / "ids.npy")})
    result = prune(recipe, tmp_path / "out")
    assert list(shares(result)) == ["model.language_model.layers"]
    assert any("model.vision_tower.encoder.layers did not run" in warning for warning in result["warnings"])


def test_the_vision_tower_is_ranked_over_whole_matrices_and_the_language_model_by_rows(
    llava: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result_of(llava, out, sparsity=0.5, settings={"pattern.whole": "*vision_tower*"})
    pruned = LlavaForConditionalGeneration.from_pretrained(out)
    for name, module in pruned.named_modules():
        if "layers" in name and isinstance(module, torch.nn.Linear):
            rows = (module.weight == 0).sum(1)
            assert int(rows.sum()) == module.weight.numel() // 2, name
            assert (len(rows.unique()) > 1) == ("vision_tower" in name), name


def test_a_glob_of_whole_matrices_that_names_none_is_refused(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pattern.whole 'visoin\*' matches no matrix"):
        result_of(llava, tmp_path / "out", sparsity=0.5, settings={"pattern.whole": "visoin*"})
    assert not (tmp_path / "out").exists()
