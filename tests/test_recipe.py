"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import PrunusError, RecipeError
from prunus.recipe import EvaluatePart, Recipe, dump, load_recipe, pattern_sparsity, recipe, schema
from prunus.recipe_options import PLACES, from_options, parse_settings

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    """A recipe file."""
    path = folder / name
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_survives_being_dumped_and_read_again(path: Path, tmp_path: Path) -> None:
    read = load_recipe(path)
    again = load_recipe(write(tmp_path, dump(read)))
    assert (again.prune, again.recover, again.evaluate) == (read.prune, read.recover, read.evaluate)
    assert again.resolved() == Recipe(**again.resolved()).resolved()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_reads_the_same_with_any_yaml_reader(path: Path) -> None:
    plain = yaml.safe_load(path.read_text("utf-8"))
    assert recipe(plain).prune == load_recipe(path).prune


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_names_parts_that_exist(path: Path) -> None:
    load_recipe(path).build()


def test_nothing_but_a_model_is_needed_and_every_default_is_written_out() -> None:
    resolved = recipe({"model": "m"}).resolved()
    assert resolved["prune"]["method"] == "wanda"
    assert resolved["prune"]["sparsity"] == 0.5
    assert resolved["calibration"]["source"] == "wikitext2"
    assert resolved["evaluate"] is None
    assert json.loads(json.dumps(resolved)) == resolved


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5), ("3:4", 0.25)])
def test_a_pattern_brings_its_sparsity(pattern: str, sparsity: float) -> None:
    assert from_options({"model": "m", "pattern": pattern}).prune.sparsity == sparsity
    assert from_options({"model": "m", "pattern": pattern, "sparsity": sparsity}).prune.sparsity == sparsity


def test_a_rounded_sparsity_means_the_pattern_s_own() -> None:
    assert from_options({"model": "m", "pattern": "2:3", "sparsity": 0.333}).prune.sparsity == pattern_sparsity("2:3")


@given(kept=st.integers(1, 64), more=st.integers(1, 64), sparsity=st.floats(0, 1, exclude_max=True))
def test_any_other_sparsity_contradicts_the_pattern(kept: int, more: int, sparsity: float) -> None:
    fixed = 1 - kept / (kept + more)
    options = {"model": "m", "pattern": f"{kept}:{kept + more}", "sparsity": sparsity}
    if abs(sparsity - fixed) < 2e-3:
        return
    with pytest.raises(RecipeError, match="contradicts sparsity"):
        from_options(options)


@pytest.mark.parametrize("text", ["pattern: 2:4", 'pattern: "2:4"', "pattern: '2:4'"])
def test_a_pattern_may_be_written_without_quotes(text: str, tmp_path: Path) -> None:
    # YAML 1.1 would read 2:4 as two minutes and four seconds.
    assert load_recipe(write(tmp_path, f"model: m\nprune: {{{text}}}")).prune.pattern == "2:4"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("0.01", 0.01), ("010", 10), ("true", True), ("no", "no"), ("2026-01-01", "2026-01-01")],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object, tmp_path: Path) -> None:
    read = load_recipe(write(tmp_path, f"model: m\nprune: {{settings: {{update.damp: {text}}}}}"))
    assert read.prune.settings["update.damp"] == value
    assert parse_settings([f"update.damp={text}"])["update.damp"] == value


def test_an_allocation_with_parameters_is_a_name_and_settings() -> None:
    spread = recipe({"model": "m", "prune": {"allocation": {"name": "owl", "span": 0.1}}}).prune
    assert (spread.allocation, spread.settings) == ("owl", {"allocation.span": 0.1})


def test_paths_are_relative_to_the_recipe_and_names_stay_names(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    text = (
        "model: dense\nout: pruned\ncalibration: {source: texts/a.txt}\nevaluate: {text: wikitext2}\n"
        "prune: {settings: {allocation.file: map.yaml}}"
    )
    read = load_recipe(write(tmp_path, text))
    assert read.model == str(tmp_path / "dense")
    assert read.out == str(tmp_path / "pruned")
    assert read.calibration.source == str(tmp_path / "texts/a.txt")
    assert read.evaluate == EvaluatePart(text="wikitext2")
    assert read.prune.settings["allocation.file"] == str(tmp_path / "map.yaml")
    assert load_recipe(write(tmp_path, "model: owner/name")).model == "owner/name"


def test_options_override_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "model: m\ncalibration: {samples: 4}\nprune: {sparsity: 0.3, settings: {update.damp: 0.1, update.block: 8}}",
    )
    laid = from_options({"sparsity": 0.7, "settings": {"update.damp": 0.2}, "samples": None}, file=file)
    assert (laid.prune.sparsity, laid.calibration.samples) == (0.7, 4)
    assert laid.prune.settings == {"update.damp": 0.2, "update.block": 8}


def test_a_replaced_part_takes_its_settings_along(tmp_path: Path) -> None:
    file = write(tmp_path, 'model: m\nprune: {pattern: "2:4", sparsity: 0.5, allocation: {name: owl, span: 0.1}}')
    laid = from_options({"allocation": "uniform", "pattern": "1:4"}, file=file).prune
    assert (laid.settings, laid.sparsity) == ({}, 0.75)


def test_an_empty_part_means_its_defaults(tmp_path: Path) -> None:
    read = load_recipe(write(tmp_path, "model: m\nprune:\nevaluate:\n"))
    assert read.evaluate == EvaluatePart()


BAD_OPTIONS = [
    ({"sparsity": "half"}, ["--sparsity", "number", "'half'"]),
    ({"sparsity": float("nan")}, ["--sparsity", "number", "nan"]),
    ({"sparsity": -0.1}, ["--sparsity", "at least 0", "-0.1"]),
    ({"sparsity": 1.0}, ["--sparsity", "below 1", "1.0"]),
    ({"sparsity": True}, ["--sparsity", "number", "true"]),
    ({"pattern": "4:2"}, ["4:2", "below M", "2:4"]),
    ({"pattern": "0:4"}, ["0:4", "at least 1"]),
    ({"pattern": "4:4"}, ["4:4", "below M"]),
    ({"pattern": "2:4", "sparsity": 0.7}, ["2:4", "0.5", "0.7", "contradicts"]),
    ({"samples": 0}, ["--samples", "at least 1"]),
    ({"samples": "many"}, ["--samples", "whole number", "'many'"]),
    ({"length": 1.5}, ["--length", "whole number", "1.5"]),
    ({"seed": -1}, ["--seed", "at least 0"]),
    ({"bos": "maybe"}, ["--bos", "auto, always or never"]),
    ({"dtype": "int8"}, ["--dtype", "float32", "bfloat16"]),
    ({"device": "gpu"}, ["--device", "cpu", "cuda"]),
    ({"compat": "original"}, ["--compat", "exact", "reference"]),
    ({"model": ""}, ["--model", "text"]),
    ({"sparsty": 0.5}, ["sparsty", "sparsity"]),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_a_bad_option_is_named_in_one_sentence(options: dict, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        from_options({"model": "m", **options}, spell={name: f"--{name}" for name in PLACES})
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


BAD_FILES = [
    ("model: m\nprune: {spasity: 0.5}", ["prune", "spasity", "Did you mean 'sparsity'"]),
    ("model: m\nsparsity: 0.5", ["sparsity", "belongs under `prune`"]),
    ("model: m\nprune: {device: cpu}", ["device", "top of the recipe"]),
    ("model: m\nprun: {}", ["prun", "Did you mean 'prune'"]),
    ("out: o", ["model", "missing"]),
    ("model: 3", ["model", "text", "3"]),
    ("model: m\nprune: wanda", ["prune", "mapping", "'wanda'"]),
    ("model: m\nprune: {ignore: '*.x'}", ["prune.ignore", "list"]),
    ("model: m\ncalibration: {samples: [1]}", ["calibration.samples", "whole number", "a list"]),
    ("model: m\nprune: {settings: {update.damp: [1]}}", ["update.damp", "one number"]),
    ("model: m\nprune: {allocation: {span: 1}}", ["allocation", "name"]),
    (
        "model: m\nprune: {allocation: {name: owl, span: 1}, settings: {allocation.span: 2}}",
        ["allocation.span", "twice"],
    ),
    ("model: m\nmodel: n", ["model", "twice", "line 2"]),
    ("- model", ["mapping", "a list"]),
    ("", ["mapping", "nothing"]),
    ("model: [", ["not valid YAML", "line 1"]),
    ("model: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ("1: m", ["mapping"]),
    ("[" * 3000, ["nested too deeply"]),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES, ids=[text[:40] for text, _ in BAD_FILES])
def test_a_bad_file_is_refused_with_the_file_s_name(text: str, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_every_mistake_in_a_file_gets_its_own_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, "model: m\nx: 1\nprune: {sparsity: 2, y: 1}"))
    assert len(str(caught.value).splitlines()) == 3


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "b.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("pairs", [["damp"], ["=3"], ["update.damp="], ["a=1", "a=2"]])
def test_a_setting_that_is_no_pair_is_refused(pairs: list[str]) -> None:
    with pytest.raises(RecipeError, match="--set"):
        parse_settings(pairs)


def test_the_schema_knows_every_key_with_a_description() -> None:
    found = schema()
    assert json.loads(json.dumps(found)) == found
    parts = [found, *found["$defs"].values()]
    fields = [field for part in parts for field in part["properties"].values()]
    bare = [field for field in fields if "description" not in field and "$ref" not in field]
    assert not bare


@given(st.text(max_size=200))
def test_no_text_makes_the_reader_fail_otherwise_than_with_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_recipe(path)
    except PrunusError as error:
        assert str(error)


def test_a_recipe_is_read_without_torch() -> None:
    code = "import sys, prunus.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
