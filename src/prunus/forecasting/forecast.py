"""Where a logged number is going, by a language model that reads the log, beside what simple methods say."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunus.data.tokens import head_token, load_tokenizer, positions
from prunus.errors import FormatError, RecipeError
from prunus.evaluation.loading import load_model
from prunus.forecasting import chain
from prunus.forecasting.baselines import BASELINES, PRIOR, skill
from prunus.forecasting.kernel import Reading, read_kernel
from prunus.forecasting.serial import Alphabet, Scale, probe_number_tokenizer
from prunus.forecasting.series import LEAST, Series, read_series
from prunus.models.source import locate, read_config
from prunus.progress import Progress, Silent
from prunus.versions import decisive

BAND = (0.05, 0.95)
MOST = 1000  # values that are read at once, however many positions there are
RATE_CHANGE = 0.1


@dataclass(frozen=True)
class Options:
    """Of a forecast.

    Attributes:
        digits: of a state: 1 to 3; None: 2, or 3 where three digits are one token.
        points: read so many last values, at least 40; None: as many as the model has positions for, at most 1,000.
        within: how near the limit counts as there, as a share of the range of the values read, in (0, 1).
        temperature: divides the digits' logits, above 0.
        extrapolate: rows beyond all states seen: "shift" or "hold".
    """

    digits: int | None = None
    points: int | None = None
    within: float = 0.05
    temperature: float = 1.0
    extrapolate: str = "shift"

    def __post_init__(self) -> None:
        """Refuse numbers out of range.

        Raises:
            RecipeError: naming the number.
        """
        rules = {
            "digits": (self.digits in (None, 1, 2, 3), "1, 2 or 3"),
            "points": (self.points is None or self.points >= LEAST, f"at least {LEAST}"),
            "within": (0 < self.within < 1, "a share above 0 and below 1"),
            "temperature": (0 < self.temperature < math.inf, "above 0"),
            "extrapolate": (self.extrapolate in ("shift", "hold"), "shift or hold"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise RecipeError(f"{name} is {rule}, not {getattr(self, name)!r}.")


class Forecaster:
    """A model that reads series."""

    def __init__(self, model: Any, alphabet: Alphabet, options: Options, *, limit: int | None = None) -> None:
        """A `model` whose tokenizer writes numbers by `alphabet`; `limit`: positions that it has, if that is known."""
        self.model, self.alphabet, self.options = model, alphabet, options
        self.digits = options.digits or (3 if alphabet.kind == "triple" else 2)
        cost = len(alphabet.number(0, self.digits)) + 1
        fit = MOST if limit is None else (limit - len(alphabet.head) - self.digits) // cost
        self.most = min(fit, options.points or MOST)
        if self.most < LEAST:
            raise RecipeError(
                f"The model has {limit} positions, enough for {self.most} values of {self.digits} digits; at least "
                f"{LEAST} are needed. Use fewer digits or another model."
            )

    def kernel(self, values: np.ndarray, progress: Progress, stage: str) -> tuple[np.ndarray, Scale, Reading]:
        """The kernel inferred from the last values that fit, its scale, and what was read.

        Raises:
            FormatError: these values are all the same.
        """
        values = values[-self.most :]
        if (values == values[0]).all():
            raise FormatError(
                f"The {len(values)} values to read are all {values[0]:g}; there is nothing to learn from. Cut the log "
                "where it stands still, or read more of it."
            )
        scale = Scale.of(values, self.digits)
        states = scale.bins(values)
        progress.stage(stage, len(np.unique(states)))
        reading = read_kernel(
            self.model, states, self.alphabet, self.digits, temperature=self.options.temperature,
            done=lambda *_: progress.advance(),
        )  # fmt: skip
        kernel = chain.fill(reading.rows, scale.states, extrapolate=self.options.extrapolate)
        return chain.regular(kernel), scale, reading


def forecast(
    log: str | Path,
    model: str | Path,
    *,
    column: str | None = None,
    options: Options | None = None,
    machine: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Predict the limit of a logged number.

    The last quarter of the log is held back first: the model and every baseline forecast it from what came before, and
    are compared by their root mean squared error there. Then the model reads all of it and predicts on.

    Args:
        log: CSV or JSON lines.
        model: folder, `.gguf`, alias or hub id; may be the very model that was pruned.
        column: of the log.
        options: see `Options`.
        machine: `device`, `dtype`, `trust_remote_code`.
        progress: told after each state that was read.

    Returns:
        See `predict`; with model, log, seconds and versions.

    Raises:
        FormatError: the log has gaps, NaN, a constant, or is too short.
        PrunusError: the model cannot be used.
    """
    options = options or Options()
    series = read_series(Path(log), column)
    machine = machine or {}
    folder = locate(model, trust_remote_code=machine.get("trust_remote_code", False))
    tokenizer = load_tokenizer(folder)
    head = head_token(tokenizer, "auto")
    alphabet = probe_number_tokenizer(tokenizer, () if head is None else (head,))
    limit = positions(read_config(folder))
    begun = time.perf_counter()
    forecaster = Forecaster(load_model(folder, **machine), alphabet, options, limit=limit)
    result = predict(series, forecaster, progress or Silent())
    return {
        "log": str(log), "model": str(model), **result, "seconds": time.perf_counter() - begun, "versions": decisive(),
    }  # fmt: skip


def predict(series: Series, forecaster: Forecaster, progress: Progress) -> dict[str, Any]:
    """The forecast of a series in memory.

    Returns:
        A JSON object: column, rows, read (values in the model's context), held (values held back), every (steps between
        rows), digits, tokenizer; last; limit {mean, low, high} (5 % and 95 %), limits (all separate ones, each with
        the range of starts that lead there), gap (1 - second eigenvalue), relaxation (steps), arrival {steps, within};
        visited and states; methods (name → {rmse, forecast}); skill (baseline → 1 - rmse/its rmse); surprise (nats a
        value: model, bigram, uniform); best, wins, verdict, warnings.
    """
    values = series.values
    held = max(10, len(values) // 4)
    methods = _backtest(values, held, forecaster, progress)
    kernel, scale, reading = forecaster.kernel(values, progress, "read the log")
    read = values[-forecaster.most :]
    states = scale.bins(read)
    grid = scale.values(np.arange(scale.states))
    found = chain.limits(kernel)
    law = chain.long_run(kernel)[states[-1]]
    mean = float(law @ grid)
    # At least half a state, or a limit between two states would have none within reach.
    within = max(forecaster.options.within * scale.span, 0.51 * float(grid[1] - grid[0]))
    goal = np.abs(grid - mean) <= within
    arrival = float(chain.hitting_time(kernel, goal)[states[-1]]) * series.every
    gap = float(1 - chain.moduli(kernel)[1])
    path = chain.after(np.eye(scale.states)[states[-1]], kernel, held) @ grid
    methods["model"]["forecast"] = float(path[-1])
    for name, baseline in BASELINES.items():
        methods[name]["forecast"] = float(baseline(read, held, scale)[-1])
    skills = {name: skill(methods["model"]["rmse"], methods[name]["rmse"]) for name in BASELINES}
    best = min([*BASELINES, "model"], key=lambda name: methods[name]["rmse"])  # of equals a baseline: it is cheaper
    relaxation = series.every / gap if gap > 0 else math.inf
    return {
        "column": series.column, "rows": len(values), "read": len(read), "held": held, "every": series.every,
        "digits": forecaster.digits, "tokenizer": forecaster.alphabet.kind, "last": float(values[-1]),
        "limit": _law(law, grid), "limits": [_limit(one, grid) for one in found],
        "gap": gap, "relaxation": relaxation, "arrival": {"steps": arrival, "within": within},
        "visited": len(reading.rows), "states": scale.states, "methods": methods, "skill": skills,
        "surprise": _surprise(states, reading, scale), "best": best, "wins": best == "model",
        "verdict": _verdict(best, skills, held), "warnings": _warnings(series, len(read), relaxation, found),
    }  # fmt: skip


def _backtest(values: np.ndarray, held: int, forecaster: Forecaster, progress: Progress) -> dict[str, dict[str, float]]:
    past, future = values[:-held], values[-held:]
    kernel, scale, _ = forecaster.kernel(past, progress, "read what is not held back")
    start = np.eye(scale.states)[scale.bins(past)[-1]]
    paths = {"model": chain.after(start, kernel, held) @ scale.values(np.arange(scale.states))}
    # Baselines read the same values: what did not fit into the model's context is not theirs either.
    paths |= {name: method(past[-forecaster.most :], held, scale) for name, method in BASELINES.items()}
    return {name: {"rmse": float(np.sqrt(np.mean((path - future) ** 2)))} for name, path in paths.items()}


def _law(law: np.ndarray, grid: np.ndarray) -> dict[str, float]:
    low, high = (float(grid[chain.quantile(law, level)]) for level in BAND)
    return {"mean": float(law @ grid), "low": low, "high": high}


def _limit(limit: chain.Limit, grid: np.ndarray) -> dict[str, Any]:
    starts = grid[limit.starts]
    return {**_law(limit.law, grid), "starts": [float(starts.min()), float(starts.max())]}


def _surprise(states: np.ndarray, reading: Reading, scale: Scale) -> dict[str, float]:
    """Mean nats for each next state; the counting model knows at each time only what came before."""
    counts = np.full((scale.states, scale.states), PRIOR)
    total = 0.0
    for before, behind in itertools.pairwise(states):
        total -= math.log(counts[before, behind] / counts[before].sum())
        counts[before, behind] += 1
    return {
        "model": float(reading.surprise.mean()),
        "bigram": total / (len(states) - 1),
        "uniform": math.log(scale.states),
    }


def _verdict(best: str, skills: dict[str, float], held: int) -> str:
    lost = sorted((name for name, value in skills.items() if value <= 0), key=lambda name: skills[name])
    if best == "model":
        return f"On the last {held} values, held back, the model forecast better than every baseline."
    names = ", ".join(lost)
    return (
        f"On the last {held} values, held back, the model did not beat {names}. Do not rely on its forecast; "
        f"{best} was the best."
    )


def _warnings(series: Series, read: int, relaxation: float, found: list[chain.Limit]) -> list[str]:
    warnings = []
    if read < len(series.values):
        warnings.append(
            f"Only the last {read} of {len(series.values)} values were read, as many as were asked for or fit into the "
            "model's context."
        )
    rates = None if series.rates is None else series.rates[-read:]
    if rates is not None and rates.max() - rates.min() > RATE_CHANGE * np.abs(rates).max():
        warnings.append(
            f"The learning rate changes from {rates[0]:g} to {rates[-1]:g} within what was read. A kernel holds for a "
            "constant rate alone: the limit is that of the mean behaviour, not of the end of the schedule."
        )
    if relaxation > read * series.every:
        warnings.append(
            f"The chain forgets its start in {relaxation:,.0f} steps, longer than what was read "
            f"({read * series.every:,.0f}); its limit lies beyond what the log shows."
        )
    if len(found) > 1:
        warnings.append(f"There are {len(found)} separate limits; the one named is that of the last value.")
    return warnings
