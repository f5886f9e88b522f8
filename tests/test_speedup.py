"""A factor of speed as a budget: found by timing stand-ins of smaller shapes, measured again on the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import prunus.engine
from prunus.bench.run import Engine, Setup, race
from prunus.errors import RecipeError
from prunus.evaluation.loading import load_model
from prunus.planning import plan
from prunus.recipe import Recipe
from prunus.recipe_options import from_options
from prunus.report import plan_text, prune_text
from prunus.speedup import NEAR, TRIALS, Trial, search, shortfall

STORIES = Path(__file__).parent / "assets" / "stories260k"
TEXT = {"source": "wikitext2", "samples": 2, "length": 32}
FIXED = 40_000  # what a token costs besides the weights that it reads, in the same unit


def recipe(method: str, factor: float, **settings: object) -> Recipe:
    part = {"method": method, "speedup": factor, "settings": settings}
    return Recipe(model=str(STORIES), calibration=TEXT, prune=part)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine whose time for a token is a constant plus the weights of the model; every folder must load and run."""
    seen: list[str] = []

    def run(folders: Mapping[str, Path], kind: str, *, setup: Setup) -> dict[str, dict[str, float]]:
        found = {}
        for name, folder in folders.items():
            model = load_model(folder)
            assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
            speed = 1e9 / (FIXED + sum(value.numel() for value in model.parameters()))
            found[name] = {"decode": speed, "prefill": 2 * speed}
        seen.append(kind)
        return found

    monkeypatch.setattr("prunus.speedup.race", run)
    monkeypatch.setattr("prunus.engine.verify", lambda *_: {"max_difference": 0.0, "tolerance": 1.0})
    return seen


@pytest.mark.parametrize(
    "method,settings", [("obs-sp", {}), ("magnitude-sp", {"method.kinds": "neurons"}), ("top", {})]
)
def test_the_result_is_as_fast_as_was_asked(method: str, settings: dict, timed: list[str], tmp_path: Path) -> None:
    result = prunus.engine.prune(recipe(method, 1.3, **settings), tmp_path / "out")
    found = result["speedup"]
    step = 0.2 if method == "top" else 0.04  # a block is a fifth of all
    assert 1.3 * (1 - NEAR) <= found["reached"]["decode"] <= 1.3 + step
    assert found["wanted"] == 1.3 and found["engine"] == "hf-fp32"
    assert result["sparsity"]["wanted"] == found["chosen"]["share"]
    assert 1 <= len(found["trials"]) <= TRIALS
    assert len(timed) == len(found["trials"]) + 1, "the result is timed once"
    for kept, whole in found["chosen"]["axes"].values():
        assert 0 < kept <= whole
    assert set(found["chosen"]["axes"]) == {
        "obs-sp": {"groups of heads", "neurons"}, "magnitude-sp": {"neurons"}, "top": {"blocks"}
    }[method]  # fmt: skip
    text = " ".join(prune_text(result).split())
    assert "asked for 1.3 x; stand-ins (" in text
    assert f"The result decodes {found['reached']['decode']:.2f} x as fast" in text


def test_a_continued_run_keeps_what_was_timed(timed: list[str], tmp_path: Path, monkeypatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("prunus.engine.verify", dies)
        with pytest.raises(KeyboardInterrupt):
            prunus.engine.prune(recipe("top", 1.3), tmp_path / "out")
    before = len(timed)
    result = prunus.engine.prune(recipe("top", 1.3), tmp_path / "out")
    assert len(timed) == before + 1
    assert len(result["speedup"]["trials"]) == before


def test_a_factor_out_of_reach_is_refused_with_the_range(timed: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--speedup 50 cannot be reached: with 80.0% .* Ask for 1 to \d"):
        prunus.engine.prune(recipe("top", 50), tmp_path / "out")
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    "part,words",
    [
        ({"method": "wanda", "speedup": 1.3}, "--speedup needs a method that makes tensors smaller"),
        ({"method": "top", "speedup": 1.3, "params": "200K"}, "--params and --speedup are different budgets"),
        ({"method": "svd", "speedup": 1.3}, "--speedup is for methods that remove heads, neurons or blocks"),
    ],
)
def test_a_speedup_without_meaning_is_refused(part: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        prunus.engine.prune(Recipe(model=str(STORIES), calibration=TEXT, prune=part), tmp_path / "out")
    assert not list(tmp_path.glob("*"))


def test_a_factor_that_is_none_is_refused_with_what_would_be() -> None:
    with pytest.raises(RecipeError, match="speedup must be a number of more than 1, not '1'"):
        from_options({"model": "m", "speedup": "1"})


def test_a_plan_says_that_timing_will_decide() -> None:
    found = plan(recipe("obs-sp", 1.3))
    assert found["sparsity"]["wanted"] is None
    assert "stand-ins of smaller shapes, timed when the run begins, say about 1.3 x" in " ".join(
        plan_text(found).split()
    )


@pytest.mark.parametrize("wanted", [1.05, 1.3, 2.0, 3.5])
@pytest.mark.parametrize("fixed", [0.02, 0.2])
def test_the_search_ends_at_the_least_share_that_is_fast_enough(wanted: float, fixed: float) -> None:
    def measure(share: float) -> Trial:
        bent = 1 - share - 0.1 * share * (1 - share)  # not quite a straight line
        return Trial(share, (1 + fixed) / (bent + fixed), {})

    shares = [step / 1000 for step in range(951)]
    trials = search(wanted, shares, measure)
    assert trials[-1].factor >= wanted
    assert len(trials) <= TRIALS
    assert trials[-1].factor <= wanted * (1 + NEAR) or len(trials) == TRIALS
    enough = min(share for share in shares if measure(share).factor >= wanted)
    assert trials[-1].share - enough < 0.03


def test_one_engine_is_timed_on_several_folders_and_neither_is_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Engine.ask
    orders: dict[str, list[str]] = {"one": [], "other": []}

    def noted(self: Engine, **order: Any) -> dict[str, Any]:
        orders[self.name].append(order["phase"])
        return ask(self, **order)

    monkeypatch.setattr(Engine, "ask", noted)
    found = race({"one": STORIES, "other": STORIES}, "hf-fp32", setup=Setup(tokens=2, prompt=4, rounds=1))
    assert found.keys() == {"one", "other"}
    assert all(speed > 0 for phases in found.values() for speed in (phases["decode"], phases["prefill"]))
    # A round of each phase was asked for; the first of either is not measured.
    assert all(phases == ["prefill", "decode"] * 2 for phases in orders.values())


@pytest.mark.parametrize(("reached", "said"), [(1.1, 1), (1.3 * (1 - NEAR), 0), (1.5, 0)])
def test_a_result_that_is_slower_than_asked_is_told(reached: float, said: int) -> None:
    found = shortfall({"wanted": 1.3, "reached": {"decode": reached, "prefill": 9.0}})
    assert len(found) == said
    assert all("Asked for 1.3 x" in line and "1.10 x" in line for line in found)
