"""Tables of what models answered: benchmark tasks, and chains that they read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FORECASTS = ROOT / "experiments" / "results" / "forecast.jsonl"
Data = Mapping[str, Any]


def tasks(name: str) -> str:
    """Accuracies of the dense and the pruned model with their paired test, and what lm-eval itself gives.

    Args:
        name: of the file in benchmarks/results, without `.json`: `{"evaluate": what evaluate returned, "lm_eval": task
            -> metric -> value of the dense model}`.
    """
    record = _read(f"{name}.json")
    found, dense = record["evaluate"], record["evaluate"]["baseline"]
    lines = []
    for task, one in found["tasks"].items():
        before = dense["tasks"][task]
        versus = one["versus"]
        shifted = f"{versus['lost']} / {versus['gained']}"
        lines.append([task, _score(before), _score(one), _norms(before, one), *_versus(versus), shifted])
    for group, one in found["groups"].items():
        lines.append([f"mean ({group})", _score(dense["groups"][group]), _score(one), "", *_versus(one["versus"]), ""])
    head = [
        "task",
        "dense acc",
        "pruned acc",
        "acc_norm of both",
        "change, points (95 %)",
        "p",
        "verdict",
        "lost / won",
    ]
    items = sorted({one["items"] for one in found["tasks"].values()})
    versions = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
    below = (
        f"The first {' or '.join(map(str, items))} items of each task, zero-shot, {found['dtype']}; "
        f"lm-eval {found['asked']['lm_eval']}, {versions}. Pruned by `{record['pruned_by']}`, judged by "
        f"`{record['judged_by']}`; *lost / won*: items that only the dense, or only the pruned, model gets right."
    )
    return "\n\n".join([_table(head, lines, right=(1, 2, 3, 4, 5, 7)), below, *_harness(record)])


def _harness(record: Data) -> list[str]:
    """What lm-eval itself gives for the dense model, beside what is shown; nothing where it was not asked."""
    dense = record["evaluate"]["baseline"]["tasks"]
    pairs = {task: (own, {key: dense[task][key] for key in own}) for task, own in record["lm_eval"].items()}
    if not pairs:
        return []
    equal = [task for task, (own, ours) in pairs.items() if own == ours]
    others = [f"{task}: {own} there, {ours} here" for task, (own, ours) in pairs.items() if own != ours]
    said = f"equal in every digit for {', '.join(equal) or 'none'}" + "".join(f"; {text}" for text in others)
    return [f"lm-eval by itself on the dense model, `{record['lm_eval_by']}`: {said}."]


def factual(name: str) -> str:
    """Plain and contrasted scores of true and false statements by the dense and the pruned model, the gain paired.

    Args:
        name: of the file in benchmarks/results, without `.json`: `{"scores": what score returned for each task, with
            its baseline, "pruned_by", "judged_by"}`.
    """
    record = _read(f"{name}.json")
    lines = []
    for found in record["scores"]:
        for words, one in (("dense", found["baseline"]), ("pruned", found)):
            most = max(one["chosen"], key=one["chosen"].__getitem__)
            share = one["chosen"][most] / sum(one["chosen"].values())
            for number, metric in enumerate(one["plain"]):
                own = [f"{found['task']}, {one['items']} items", words] if not number else ["", ""]
                scores = [_pm(one["plain"][metric]), _pm(one["contrasted"][metric]), _pm(one["gain"][metric], "+")]
                lines.append([*own, metric, *scores, f"{most} ({100 * share:.0f} %)" if not number else ""])
    first = record["scores"][0]
    layers, versions = first["dola"]["candidates"], ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    below = (
        f"Premature layers {', '.join(map(str, layers))}, read without the last norm; float32; ± one standard error "
        f"over items; {versions}. Pruned by `{record['pruned_by']}`, judged by `{record['judged_by']}`."
    )
    head = ["statements", "model", "metric", "plain", "DoLa", "gain, paired", "layer chosen most"]
    return "\n\n".join([_table(head, lines, right=(3, 4, 5)), below])


def probed(name: str) -> str:
    """What a pruned model still learns of a Markov chain that it reads, beside the dense one."""
    record = _read(f"{name}.json")
    found = record["probe"]
    rows = [
        [words, *(f"{one[key]:.4f}" for key in ("area", "stderr", "end"))]
        for words, one in (("dense", found["baseline"]), ("pruned", found))
    ]
    rows += [
        [words, f"{found[key]:.4f}", "", ""]
        for key, words in (("uniform", "a uniform guess"), ("counting", "counting"))
    ]
    below = (
        f"{found['chains']} chains of {found['states']} states and {found['length']} steps, seed {found['seed']}; "
        f"{', '.join(f'{k} {v}' for k, v in found['versions'].items())}. Pruned by `{record['pruned_by']}`."
    )
    head = ["", "distance to the true law", "standard error over chains", "at the end"]
    return "\n\n".join([_table(head, rows, right=(1, 2, 3)), below])


def stationary() -> str:
    """W1 of the stationary law of an Ornstein-Uhlenbeck series to the truth, seed by seed."""
    lines = [json.loads(line) for line in FORECASTS.read_text("utf-8").splitlines()]
    own = [line for line in lines if line["kind"] == "ou"]
    kinds = ("model", "bigram", "histogram")
    rows = [
        [str(line["seed"]), *(f"{line['w1'][kind]:.4f}" for kind in kinds), f"{line['row_w1']:.4f}"] for line in own
    ]
    means = [f"{statistics.fmean(line['w1'][kind] for line in own):.4f}" for kind in kinds]
    rows.append(["mean", *means, f"{statistics.fmean(line['row_w1'] for line in own):.4f}"])
    return _table(
        ["seed", "SmolLM2-135M", "counting transitions", "histogram", "a row of the kernel"], rows, range(1, 5)
    )


def _score(one: Data) -> str:
    return f"{one['acc']:.3f} ± {one['stderr']:.3f}"


def _norms(dense: Data, pruned: Data) -> str:
    return "" if dense["acc_norm"] is None else f"{dense['acc_norm']:.2f}, {pruned['acc_norm']:.2f}"


def _versus(one: Data) -> list[str]:
    low, high = 100 * one["low"], 100 * one["high"]
    return [f"{100 * one['difference']:+.1f} ({low:+.1f} to {high:+.1f})", f"{one['p']:.3f}", one["verdict"]]


def _pm(one: Data, sign: str = "") -> str:
    return f"{one['mean']:{sign}.3f}" + ("" if one["stderr"] is None else f" ± {one['stderr']:.3f}")


def _read(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text("utf-8"))


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    rule = ["--:" if number in set(right) else "---" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *lines))
