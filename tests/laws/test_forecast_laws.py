"""Laws F1 to F15 of the forecaster (numbers of the specification), on models whose kernel is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunus.forecasting import chain
from prunus.forecasting.baselines import BASELINES, bigram_kernel, skill
from prunus.forecasting.forecast import Forecaster, Options, predict
from prunus.forecasting.kernel import Context, read_kernel
from prunus.forecasting.probe import counting, distances, power, random_chain
from prunus.forecasting.serial import Alphabet, Scale, probe_number_tokenizer
from prunus.forecasting.series import Series
from prunus.progress import Silent

DIGIT = Alphabet("digit", tuple(range(10)), 10)
TRIPLE = Alphabet("triple", tuple(range(1000)), 1000)
STORIES = Path(__file__).parent.parent / "assets" / "stories260k"


class Knower(nn.Module):
    """A model without weights or cache: after each comma it writes the digits of the next state by a kernel.

    `kernel(past)` gives the law of the next state after the states `past`; an array is a kernel of the last alone.
    """

    def __init__(self, kernel: Any, alphabet: Alphabet, digits: int) -> None:
        super().__init__()
        self.kernel, self.alphabet, self.digits = kernel, alphabet, digits
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        size = len(self.alphabet.symbols)
        logits = torch.zeros(*input_ids.shape, size + 1, dtype=torch.float64)
        for row, ids in enumerate(input_ids.tolist()):
            past: list[int] = []
            begun: list[int] = []
            for place, index in enumerate(ids):
                if index == self.alphabet.comma:
                    past.append(self._state(begun))
                    begun = []
                else:
                    begun.append(index)
                if past and len(begun) < self.digits // self.alphabet.width:
                    logits[row, place, :size] = self._logits(past, begun)
        return SimpleNamespace(logits=logits, past_key_values=None)

    def _logits(self, past: list[int], begun: list[int]) -> torch.Tensor:
        markov, key = isinstance(self.kernel, np.ndarray), (past[-1], *begun)
        if not markov or key not in self.known:
            size = len(self.alphabet.symbols)
            law = torch.as_tensor(self.kernel[past[-1]] if markov else self.kernel(past))
            law = law.reshape(*[size] * (self.digits // self.alphabet.width))
            for symbol in begun:
                law = law[symbol]
            # A constant more or less must not matter: only ratios of probabilities do.
            self.known[key] = law.reshape(size, -1).sum(1).log() + 3
        return self.known[key]

    def _state(self, symbols: list[int]) -> int:
        return int("".join(f"{symbol:0{self.alphabet.width}d}" for symbol in symbols))


def noise(states: int, seed: int = 0) -> np.ndarray:
    kernel = np.random.default_rng(seed).random((states, states)) ** 3 + 1e-3
    return kernel / kernel.sum(1, keepdims=True)


def walk(kernel: np.ndarray, length: int, seed: int = 0, start: int = 0) -> np.ndarray:
    generator, path = np.random.default_rng(seed), [start]
    while len(path) < length:
        path.append(int(generator.choice(len(kernel), p=kernel[path[-1]])))
    return np.array(path)


def ou(states: int, mean: float, pull: float, spread: float) -> np.ndarray:
    """x' = x - pull (x - mean) + spread·noise on the grid, by the normal density at the centres."""
    grid = np.arange(states)
    law = np.exp(-0.5 * ((grid[None] - (grid[:, None] - pull * (grid[:, None] - mean))) / spread) ** 2)
    return law / law.sum(1, keepdims=True)


@pytest.mark.parametrize(("digits", "alphabet", "length"), [(1, DIGIT, 40), (2, DIGIT, 25), (3, TRIPLE, 12)])
def test_f1_f2_an_oracle_gives_its_kernel_back(digits: int, alphabet: Alphabet, length: int) -> None:
    kernel = noise(10**digits)
    states = walk(kernel, length)
    reading = read_kernel(Knower(kernel, alphabet, digits), states, alphabet, digits)
    assert set(reading.rows) == set(states.tolist())
    for state, row in reading.rows.items():
        assert np.abs(row - kernel[state]).max() < 1e-6
        assert abs(row.sum() - 1) < 1e-9 and (row >= 0).all()
    whole = chain.regular(chain.fill(reading.rows, 10**digits))
    assert np.abs(whole.sum(1) - 1).max() < 1e-9 and (whole > 0).all()


def test_f2_three_digits_by_single_digits() -> None:
    kernel = noise(1000)
    states = np.array([5, 700, 5])
    reading = read_kernel(Knower(kernel, DIGIT, 3), states, DIGIT, 3)
    assert max(np.abs(row - kernel[state]).max() for state, row in reading.rows.items()) < 1e-6


def test_f3_a_counter_gives_the_smoothed_counts_before_the_last_visit() -> None:
    states = walk(noise(10), 200)
    prior = 0.7

    def counted(past: list[int]) -> np.ndarray:
        return bigram_kernel(np.array(past), 10, prior)[past[-1]]

    reading = read_kernel(Knower(counted, DIGIT, 1), states, DIGIT, 1)
    for state, row in reading.rows.items():
        last = int(np.flatnonzero(states == state)[-1])
        counts = np.full(10, prior)
        for place in range(last):
            counts[states[place + 1]] += states[place] == state
        assert np.abs(row - counts / counts.sum()).max() < 1e-6


def test_f3_the_error_of_counting_falls_with_the_root_of_the_context() -> None:
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(8):
        kernel, path = random_chain(4, 4000, generator)
        errors.append(distances(kernel[path], counting(path, 4)))
    exponent, fit = power(np.array(errors).mean(0))
    # The distance is quadratic in the error of the law, so T^-1/2 there is T^-1 here.
    assert 0.8 < exponent < 1.2 and fit > 0.97


@pytest.mark.parametrize(("digits", "alphabet"), [(1, DIGIT), (2, DIGIT), (3, DIGIT), (3, TRIPLE)])
def test_f4_every_state_survives_writing_and_reading(digits: int, alphabet: Alphabet) -> None:
    states = list(range(10**digits))
    ids = alphabet.write(states, digits)
    assert alphabet.read(ids, digits) == states
    assert len(ids) == len(states) * (digits // alphabet.width + 1)


def test_f4_bins_keep_grid_values_and_order() -> None:
    scale = Scale(0.15, 0.70, 3)  # so that the value is its own share
    grid = np.arange(150, 851) / 1000
    assert scale.bins(grid).tolist() == list(range(150, 851))
    values = np.sort(np.random.default_rng(0).normal(size=500))
    made = Scale.of(values, 2).bins(values)
    assert (np.diff(made) >= 0).all() and made[0] == 15 and made[-1] == 85


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100), st.floats(-100, 100))
def test_f5_scaling_the_values_scales_the_bins_back(factor: float, shift: float) -> None:
    values = np.random.default_rng(1).normal(size=60)
    one, two = Scale.of(values, 2), Scale.of(factor * values + shift, 2)
    bins = one.bins(values)
    assert (np.abs(two.bins(factor * values + shift) - bins) <= 1).all()  # rounding at a border moves one bin
    assert np.allclose(two.values(bins), factor * one.values(bins) + shift, rtol=1e-9, atol=1e-9)


def test_f6_digits_and_triples_agree() -> None:
    kernel = noise(1000, seed=3)
    states = np.array([1, 999, 500])
    one = read_kernel(Knower(kernel, DIGIT, 3), states, DIGIT, 3).rows
    two = read_kernel(Knower(kernel, TRIPLE, 3), states, TRIPLE, 3).rows
    assert all(np.abs(one[state] - two[state]).max() < 1e-6 for state in one)


@pytest.fixture(scope="module")
def stories() -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    return model, probe_number_tokenizer(AutoTokenizer.from_pretrained(STORIES), (1,))


def test_f7_f14_a_real_models_rows_are_the_scores_of_all_strings(stories: Any) -> None:
    model, alphabet = stories
    assert alphabet.kind == "digit"
    states = np.array([12, 34, 56, 12, 34])
    reading = read_kernel(model, states, alphabet, 2)
    for state, seen in ((34, 5), (56, 3)):
        ids = alphabet.write(states[:seen], 2)
        batch = torch.tensor([[*ids, tens] for tens in alphabet.symbols])
        logits = model(batch).logits.detach()[:, :, list(alphabet.symbols)].log_softmax(-1)
        brute = (logits[0, -2][:, None] + logits[:, -1]).exp().flatten().numpy()
        assert brute.sum() == pytest.approx(1, abs=1e-5)
        assert np.abs(reading.rows[state] - brute).max() < 1e-5


def test_f14_the_tree_on_the_cache_is_the_whole_forward(stories: Any) -> None:
    model, alphabet = stories
    context = Context(model, alphabet.write([7, 77, 42], 2), alphabet)
    paths = [(symbol,) for symbol in alphabet.symbols]
    tree, slow = context.branches(7, paths), context._one_by_one(7, paths)
    assert context._tree is True
    assert torch.allclose(tree, slow, atol=1e-4)


def test_f8_the_stationary_law_of_two_states_and_of_ou() -> None:
    two = np.array([[0.9, 0.1], [0.3, 0.7]])
    assert chain.stationary(two) == pytest.approx([0.75, 0.25])
    assert chain.moduli(two)[1] == pytest.approx(0.6)
    kernel = chain.regular(ou(100, 50, 0.2, 4))
    law = chain.stationary(kernel)
    assert np.abs(law @ kernel - law).max() < 1e-12
    grid = np.arange(100)
    assert law @ grid == pytest.approx(50, abs=0.01)
    assert np.sqrt(law @ (grid - law @ grid) ** 2) == pytest.approx(4 / np.sqrt(1 - 0.8**2), rel=0.01)
    assert 1 - chain.moduli(kernel)[1] == pytest.approx(0.2, abs=0.01)


def test_f8_an_absorbing_chain_has_two_limits() -> None:
    kernel = np.eye(6)
    for state in (1, 2, 3, 4):
        kernel[state] = 0
        kernel[state, [state - 1, state + 1]] = 0.5
    found = chain.limits(kernel)
    assert sorted(int(limit.law.argmax()) for limit in found) == [0, 5]
    assert [limit.law.max() > 0.99 for limit in found] == [True, True]
    assert len(chain.limits(chain.regular(ou(50, 20, 0.3, 3)))) == 1


def test_f9_barycenters_of_points_ends_and_known_rows() -> None:
    point = np.eye(20)
    assert chain.barycenter(point[2], point[12], 0.3).nonzero()[0].tolist() == [5]
    between = chain.barycenter(point[2], point[3], 0.25)
    assert between[[2, 3]] == pytest.approx([0.75, 0.25])
    laws = noise(20)[:2]
    assert np.allclose(chain.barycenter(*laws, 0.0), laws[0]) and np.allclose(chain.barycenter(*laws, 1.0), laws[1])
    rows = {3: laws[0], 11: laws[1]}
    kernel = chain.fill(rows, 20)
    assert (kernel[3] == laws[0]).all() and (kernel[11] == laws[1]).all()
    grid = np.arange(20)
    assert kernel[5] @ grid == pytest.approx(0.75 * (laws[0] @ grid) + 0.25 * (laws[1] @ grid))
    assert (chain.fill(rows, 20, extrapolate="hold")[0] == laws[0]).all()
    assert chain.fill({3: point[3]}, 20)[15].argmax() == 15


def test_f9_an_eighth_of_the_rows_of_ou_gives_the_rest() -> None:
    true = ou(100, 50, 0.1, 4)
    kernel = chain.fill({state: true[state] for state in range(0, 100, 8)}, 100)
    inner = range(8, 89)
    assert max(0.5 * np.abs(kernel[state] - true[state]).sum() for state in inner) < 0.03


def test_f10_hitting_times_are_those_of_simulation_and_infinite_where_they_must() -> None:
    kernel = noise(8)
    goal = np.arange(8) == 5
    times = chain.hitting_time(kernel, goal)
    generator, counts = np.random.default_rng(0), []
    for _ in range(1500):
        state, steps = 0, 0
        while state != 5:
            state, steps = int(generator.choice(8, p=kernel[state])), steps + 1
        counts.append(steps)
    assert times[0] == pytest.approx(np.mean(counts), rel=0.1) and times[5] == 0
    closed = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
    assert chain.hitting_time(closed, np.array([True, False, False])).tolist() == [0, np.inf, np.inf]
    assert chain.hitting_time(closed, np.array([False, True, False])) == pytest.approx([2, 0, 2])


def test_f11_a_constant_is_a_point_and_divides_by_nothing() -> None:
    values = np.full(50, 3.5)
    scale = Scale.of(values, 2)
    states = scale.bins(values)
    assert (states == 15).all() and scale.values(states) == pytest.approx(values)
    stay = chain.regular(np.eye(100))
    reading = read_kernel(Knower(stay, DIGIT, 2), states, DIGIT, 2)
    kernel = chain.fill(reading.rows, 100)
    assert chain.after(np.eye(100)[15], kernel, 9)[-1].argmax() == 15
    assert all(np.isfinite(method(values, 5, scale)).all() for method in BASELINES.values())


def test_f12_unseen_starts_go_to_the_minimum_of_their_own_well() -> None:
    # Gradient descent on the double well (x² - 1)², from -1.6 … 1.6, with a little noise.
    grid = np.linspace(-1.6, 1.6, 100)
    centre = grid - 0.05 * 4 * grid * (grid**2 - 1)
    true = np.exp(-0.5 * ((grid[None] - centre[:, None]) / 0.04) ** 2)
    true /= true.sum(1, keepdims=True)
    known = [state for state in range(5, 95) if state % 7 == 0]
    run = chain.long_run(chain.regular(chain.fill({state: true[state] for state in known}, 100), 1e-9))
    for start in (2, 12, 25, 36):
        assert run[start] @ grid == pytest.approx(-1, abs=0.1)
        assert run[99 - start] @ grid == pytest.approx(1, abs=0.1)


def series(values: np.ndarray, rates: np.ndarray | None = None) -> Series:
    return Series("loss", values, 1.0, None, rates)


def knower_of(kernel: np.ndarray) -> Forecaster:
    return Forecaster(Knower(kernel, DIGIT, 2), DIGIT, Options())


@pytest.fixture(scope="module")
def path() -> np.ndarray:
    return walk(ou(100, 50, 0.15, 5), 160, start=15).astype(float)


def test_f13_a_learning_rate_that_changes_is_named(path: np.ndarray) -> None:
    kernel = ou(100, 50, 0.15, 5)
    constant = predict(series(path, np.full(160, 1e-3)), knower_of(kernel), Silent())
    assert not any("learning rate" in warning for warning in constant["warnings"])
    falling = predict(series(path, np.linspace(1e-3, 5e-4, 160)), knower_of(kernel), Silent())
    assert any("learning rate" in warning for warning in falling["warnings"])


def test_f15_every_baseline_has_its_skill_and_a_loss_is_said(path: np.ndarray) -> None:
    kernel = ou(100, 50, 0.15, 5)
    result = predict(series(path), knower_of(kernel), Silent())
    assert set(result["skill"]) == set(BASELINES) == set(result["methods"]) - {"model"}
    for name, value in result["skill"].items():
        ratio = result["methods"]["model"]["rmse"] / result["methods"][name]["rmse"]
        assert value == pytest.approx(1 - ratio)
    # A model that knows nothing loses, and the verdict says to whom.
    lost = predict(series(path), knower_of(chain.regular(np.eye(100)[::-1])), Silent())
    assert not lost["wins"] and "did not beat" in lost["verdict"] and lost["best"] in lost["verdict"]


def test_f15_for_a_series_without_memory_nobody_beats_its_mean_by_much() -> None:
    values = np.random.default_rng(5).normal(50, 5, size=240).round()
    law = np.bincount(Scale.of(values, 2).bins(values), minlength=100) / 240.0
    result = predict(series(values), knower_of(np.tile(law + 1e-9, (100, 1)) / (1 + 1e-7)), Silent())
    assert abs(result["skill"]["mean"]) < 0.05
    assert skill(0.0, 0.0) == 0 and skill(1.0, 0.0) == -np.inf


def test_the_law_of_the_limit_is_that_of_the_chain(path: np.ndarray) -> None:
    kernel = ou(100, 50, 0.15, 5)
    scale = Scale.of(path, 2)

    # The kernel of the values, carried to the states of the scale.
    grid = scale.values(np.arange(100))
    inner = np.exp(-0.5 * ((grid[None] - (grid - 0.15 * (grid - 50))[:, None]) / 5) ** 2)
    inner /= inner.sum(1, keepdims=True)
    result = predict(series(path), knower_of(inner), Silent())
    true = chain.stationary(chain.regular(kernel)) @ np.arange(100)
    assert result["limit"]["mean"] == pytest.approx(true, abs=1.0)
    assert result["limit"]["low"] < true < result["limit"]["high"]
    assert result["wins"] == (result["best"] == "model")


def test_f5_the_forecast_of_scaled_values_is_the_scaled_forecast(path: np.ndarray) -> None:
    kernel = ou(100, 50, 0.15, 5)
    one = predict(series(path), knower_of(kernel), Silent())
    two = predict(series(4 * path - 32), knower_of(kernel), Silent())
    for key in ("mean", "low", "high"):
        assert two["limit"][key] == pytest.approx(4 * one["limit"][key] - 32)
    assert two["gap"] == pytest.approx(one["gap"])
    assert two["skill"] == pytest.approx(one["skill"], abs=1e-6)


def ou_path(points: int, seed: int) -> np.ndarray:
    """x' = x - 0.1 (x - 2) + 0.2·noise, from its own long run."""
    generator = np.random.default_rng(seed)
    values = [2 + 0.2 / np.sqrt(1 - 0.9**2) * generator.standard_normal()]
    while len(values) < points:
        values.append(values[-1] - 0.1 * (values[-1] - 2) + 0.2 * generator.standard_normal())
    return np.array(values)


@pytest.mark.parametrize("seed", [100, 101, 102])
def test_f8_what_learns_ou_in_context_has_its_law_within_a_twentieth_after_500_points(seed: int) -> None:
    values = ou_path(500, seed)
    scale = Scale.of(values, 3)
    states, grid = scale.bins(values), np.arange(1000.0)

    def fitted(past: list[int]) -> np.ndarray:
        """The law by a straight line through what came after what, as far as it was read."""
        seen = np.array(past, dtype=float)
        slope, level, spread = 0.0, seen.mean(), 100.0
        if len(seen) > 20:
            slope, level = np.polyfit(seen[:-1], seen[1:], 1)
            spread = (seen[1:] - slope * seen[:-1] - level).std()
        law = np.exp(-0.5 * ((grid - slope * seen[-1] - level) / spread) ** 2) + 1e-12
        return law / law.sum()

    reading = read_kernel(Knower(fitted, TRIPLE, 3), states, TRIPLE, 3)
    # Early visits of rare states were read with little context: their rows are rough, the law need not be.
    found = chain.stationary(chain.regular(chain.fill(reading.rows, 1000)))
    true = np.exp(-0.5 * ((scale.values(np.arange(1000)) - 2) / (0.2 / np.sqrt(1 - 0.9**2))) ** 2)
    assert chain.wasserstein(found, true / true.sum()) / 1000 < 0.05
