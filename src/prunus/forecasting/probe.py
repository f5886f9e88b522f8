"""In-context ability: how well a model learns the rules of a random Markov chain that it only reads.

No word of any language is involved, so what is measured is the copying and counting that pruning may cost first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prunus.data.tokens import head_token, load_tokenizer, positions
from prunus.errors import RecipeError, near
from prunus.evaluation.loading import load_model
from prunus.forecasting.baselines import PRIOR
from prunus.forecasting.kernel import Context
from prunus.forecasting.serial import Alphabet, probe_number_tokenizer
from prunus.models.source import locate, read_config
from prunus.progress import Progress, Silent
from prunus.versions import decisive

CHAINS, STATES, LENGTH, SEED = 4, 5, 500, 0
FIRST = 10  # positions before this say more about the prompt than about the model


def random_chain(states: int, length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A kernel of uniform random rows, normalised, and a path of it: float64 [states, states] and int64 [length]."""
    kernel = generator.random((states, states))
    kernel /= kernel.sum(1, keepdims=True)
    path = [int(generator.integers(states))]
    while len(path) < length:
        path.append(int(generator.choice(states, p=kernel[path[-1]])))
    return kernel, np.array(path)


def read_errors(model: Any, kernel: np.ndarray, path: np.ndarray, alphabet: Alphabet) -> np.ndarray:
    """Bhattacharyya distance between the true law of each next state and the model's, float64 [length]."""
    digits = Alphabet("digit", alphabet.symbols[: len(kernel)], alphabet.comma, alphabet.head)
    ids = [*digits.head, *(digits.symbols[state] for state in path)]
    laws = Context(model, ids, digits).log_p[len(digits.head) :].double().exp().cpu().numpy()
    return distances(kernel[path], laws)


def distances(true: np.ndarray, found: np.ndarray) -> np.ndarray:
    """-ln sum sqrt(p q), row by row, at least 0."""
    return np.maximum(-np.log(np.sqrt(true * found).sum(1)), 0)


def counting(path: np.ndarray, states: int, prior: float = PRIOR) -> np.ndarray:
    """The laws of who counts transitions as they come, float64 [length, states]."""
    counts = np.full((states, states), prior)
    laws = []
    for place, state in enumerate(path):
        if place:
            counts[path[place - 1], state] += 1
        laws.append(counts[state] / counts[state].sum())
    return np.array(laws)


def power(errors: np.ndarray) -> tuple[float, float]:
    """Exponent and R² of errors ~ c·t**-exponent, fitted on log-spaced windows from `FIRST` on."""
    edges = np.unique(np.geomspace(FIRST, len(errors), 9).astype(int))
    pairs = list(itertools.pairwise(edges))
    times = np.log([math.sqrt(low * high) for low, high in pairs])
    logs = np.log([max(errors[low:high].mean(), 1e-12) for low, high in pairs])
    slope, constant = np.polyfit(times, logs, 1)
    rest = logs - (slope * times + constant)
    total = ((logs - logs.mean()) ** 2).sum()
    return -float(slope), 1 - float((rest**2).sum() / total) if total > 0 else 0.0


def markov(model: Any, alphabet: Alphabet, *, length: int = LENGTH, progress: Progress | None = None) -> dict[str, Any]:
    """The probe for a model in memory.

    Returns:
        area (mean distance over positions and chains: smaller is better), stderr (over chains), end (over the last
        tenth), exponent and fit (R²) of its power law, counting and uniform (area of who counts, and of who knows
        nothing), learned (1 - area/uniform: 1 is perfect, 0 is nothing), chains, states, length.
    """
    progress = progress or Silent()
    progress.stage("markov probe", CHAINS)
    generator = np.random.default_rng(SEED)
    found: dict[str, list[np.ndarray]] = {"model": [], "counting": [], "uniform": []}
    for _ in range(CHAINS):
        kernel, path = random_chain(STATES, length, generator)
        found["model"].append(read_errors(model, kernel, path, alphabet))
        found["counting"].append(distances(kernel[path], counting(path, STATES)))
        found["uniform"].append(distances(kernel[path], np.full((length, STATES), 1 / STATES)))
        progress.advance()
    curves = {name: np.array(rows)[:, FIRST:] for name, rows in found.items()}
    exponent, fit = power(np.array(found["model"]).mean(0))
    area = {name: float(rows.mean()) for name, rows in curves.items()}
    return {
        "area": area["model"], "stderr": float(curves["model"].mean(1).std(ddof=1) / math.sqrt(CHAINS)),
        "end": float(curves["model"][:, -length // 10 :].mean()), "exponent": exponent, "fit": fit,
        "counting": area["counting"], "uniform": area["uniform"], "learned": 1 - area["model"] / area["uniform"],
        "chains": CHAINS, "states": STATES, "length": length, "seed": SEED,
    }  # fmt: skip


PROBES: dict[str, Callable[..., dict[str, Any]]] = {"markov": markov}


def probe(
    name: str,
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    machine: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A probe of a model, and of the dense one beside it on the same chains.

    Args:
        name: a row of `PROBES`.
        model: folder, `.gguf`, alias or hub id.
        baseline: probed first.
        machine: `device`, `dtype`, `trust_remote_code`.
        progress: told after each chain.

    Returns:
        model, probe, what `markov` returns, versions and, where asked, baseline.

    Raises:
        PrunusError: an unknown probe, or a model that cannot be used.
    """
    if name not in PROBES:
        raise RecipeError(f"Unknown probe {name!r}.{near(name, PROBES)}")
    machine = machine or {}
    names = [str(model)] if baseline is None else [str(baseline), str(model)]
    folders = [locate(each, trust_remote_code=machine.get("trust_remote_code", False)) for each in names]
    # The same length for both, so that they are compared on the same numbers.
    limit = min([LENGTH, *(positions(read_config(folder)) or LENGTH for folder in folders)]) - 1
    results = []
    for each, folder in zip(names, folders, strict=True):
        tokenizer = load_tokenizer(folder)
        head = head_token(tokenizer, "auto")
        alphabet = probe_number_tokenizer(tokenizer, () if head is None else (head,))
        found = PROBES[name](load_model(folder, **machine), alphabet, length=limit, progress=progress)
        results.append({"model": each, "probe": name, **found, "versions": decisive()})
    return results[-1] if baseline is None else {**results[1], "baseline": results[0]}
