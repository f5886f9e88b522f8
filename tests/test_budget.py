"""Budgets in parameters and bytes are met within one unit, and out of reach they are refused with the range."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import prunus.engine
from prunus.errors import RecipeError
from prunus.planning import plan
from prunus.recipe import Recipe

STORIES = Path(__file__).parent / "assets" / "stories260k"
TEXT = {"source": "wikitext2", "samples": 2, "length": 32}
NEURON = 3 * 64 * 5  # of every block


def recipe(**part: object) -> Recipe:
    return Recipe(model=str(STORIES), calibration=TEXT, prune={"method": "magnitude-sp", **part})


@pytest.mark.parametrize("budget,counted", [({"params": "200K"}, "numbers"), ({"size": "0.7MB"}, "bytes")])
def test_the_result_has_what_was_asked_for(budget: dict, counted: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("prunus.engine.verify", lambda *_: {"max_difference": 0.0, "tolerance": 1.0})
    prunus.engine.prune(recipe(**budget, settings={"method.kinds": "neurons"}), tmp_path / "out")
    tensors = [value for file in (tmp_path / "out").glob("*.safetensors") for value in load_file(file).values()]
    if counted == "numbers":
        assert abs(sum(value.numel() for value in tensors) - 200_000) <= NEURON
    else:
        assert abs(sum(value.nbytes for value in tensors) - 700_000) <= NEURON * tensors[0].element_size()


@pytest.mark.parametrize(
    "part,words",
    [
        ({"params": "10K"}, r"--params 10K cannot be reached: .* ask for more than 33\.47K and at most 260K"),
        ({"params": "1M"}, "--params 1M cannot be reached"),
        ({"size": "1KB"}, "--size 1KB cannot be reached"),
        ({"params": "many"}, "--params 'many' is no number; write it as 100M or 1.2B"),
        ({"size": "80MiB"}, "--size '80MiB' is no number; write it as 80MB"),
        ({"params": "200K", "size": "80MB"}, "--params and --size are different budgets"),
        ({"params": "200K", "sparsity": 0.3}, "--params and --sparsity are different budgets"),
        ({"method": "wanda", "params": "200K"}, "--params needs a method that makes tensors smaller"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_with_what_can(part: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        plan(recipe(**part))
