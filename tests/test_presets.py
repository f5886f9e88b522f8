"""A preset is a whole choice under one word: it completes a recipe and contradicts nothing silently."""

from __future__ import annotations

import pytest

from prunus.errors import RecipeError
from prunus.methods.catalogue import rows
from prunus.presets import PRESETS, preset
from prunus.recipe import Recipe, load_recipe, recipe
from prunus.recipe_options import from_options

NAMES = sorted(PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_the_same_as_its_parts_written_out(name: str) -> None:
    one = PRESETS[name]
    short = recipe({"model": "m", "prune": {"preset": name, "sparsity": 0.7}})
    parts = {"method": one.method, "allocation": one.allocation, "settings": dict(one.settings), "sparsity": 0.7}
    parts |= {"update": one.update} if one.update else {}
    assert short.build() == recipe({"model": "m", "prune": parts}).build()
    assert short.resolved()["prune"].items() >= parts.items()


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_preset_reads_back_equal(name: str) -> None:
    found = recipe({"model": "m", "prune": {"preset": name}})
    assert Recipe(**found.resolved()) == found


@pytest.mark.parametrize("name", NAMES)
def test_allocation_pattern_and_settings_may_be_others(name: str) -> None:
    options = {"model": "m", "preset": name, "allocation": "er", "pattern": "2:4"}
    prune = from_options(options).resolved()["prune"]
    assert (prune["allocation"], prune["pattern"], prune["method"]) == ("er", "2:4", PRESETS[name].method)
    assert not any(key.startswith("allocation.") for key in prune["settings"])


@pytest.mark.parametrize("axis,value", [("method", "ria"), ("metric", "ria"), ("update", "dsnot")])
def test_another_method_contradicts_a_preset(axis: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"preset best.*contradicts {axis} '{value}'"):
        from_options({"model": "m", "preset": "best", axis: value})


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="'balanced'"):
        from_options({"model": "m", "preset": "balancd"})
    with pytest.raises(RecipeError, match="'fast'"):
        preset("fats")


def test_options_replace_a_file_s_choice_as_a_whole(tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\nprune: {method: sparsegpt, allocation: {name: owl, span: 0.1}, sparsity: 0.6}\n")
    found = from_options({"preset": "fast"}, file=file)
    assert (found.prune.method, found.prune.allocation, found.prune.settings) == ("wanda", "uniform", {})
    assert found.prune.sparsity == 0.6
    file.write_text("model: m\nprune: {preset: best}\n")
    assert load_recipe(file).prune.method == PRESETS["best"].method
    assert from_options({"method": "ria"}, file=file).prune.preset is None


def test_the_catalogue_lists_presets_first() -> None:
    assert [row["name"] for row in rows() if row["kind"] == "preset"] == list(PRESETS)
