"""`prunus score`: does the model prefer what is true, plain and by DoLa."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli.options import MACHINE, Json, Quiet, option, takes
from prunus.cli.session import show, working

EXAMPLES = {
    "score": """
prunus score smollm2 --task truthfulqa --task-data DIR --dola high
prunus score out --task factor_news --task-data DIR --baseline smollm2
"""
}

WHAT = "What to score"
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A folder, a hub id, a .gguf file or an alias such as smollm2."
    ),
]
Task = Annotated[str, option("--task NAME", WHAT, "truthfulqa, factor_news or factor_expert.")]
Data = Annotated[
    str, option("--task-data DIR", WHAT, "Folder with the task's file as published: jsonl or csv, also as .gz.")
]
SCORE = {
    "baseline": option("--baseline MODEL", WHAT, "Score this model too, on the same items: usually the dense one."),
    "preamble": option(
        "--preamble FILE",
        WHAT,
        "Text to put before every item, such as examples; none: nothing. Default: as published, six answered questions "
        "before those of TruthfulQA and nothing for FACTOR.",
    ),
    "limit": option("--limit N", WHAT, "Only the first N items, at least 1. Default: all."),
    "dola": option(
        "--dola LAYERS",
        WHAT,
        "Premature layers: low, high, or numbers such as 16,18 or 16-30:2. Default: as published, high for TruthfulQA "
        "and low for FACTOR.",
    ),
    "dola_norm": option(
        "--dola-norm NORM",
        WHAT,
        "none: the head reads premature layers as they are, as published; final: through the last norm. Default: none.",
    ),
    "compat": option(
        "--compat MODE",
        WHAT,
        "exact: the Jensen-Shannon divergence; published: what the published code computes in its place. "
        "Default: exact.",
    ),
    "device": option("--device DEVICE", MACHINE, "cpu, cuda or cuda:1. Default: cpu."),
    "dtype": option("--dtype DTYPE", MACHINE, "float32, bfloat16, float16 or auto. Default: auto (float32 on a CPU)."),
    "trust_remote_code": option(
        "--trust-remote-code", MACHINE, "Run Python code that a model's folder brings along; read it first."
    ),
}


@takes(SCORE)
def score(
    model: Model, task: Task, task_data: Data, as_json: Json = False, quiet: Quiet = False, **options: Any
) -> None:
    """Score true and false statements by MODEL: plain, and by DoLa from the same forward passes.

    A statement's score is the sum of its tokens' log-probabilities. Standard errors are of the mean
    over items; the gain is paired, item by item.
    """
    with working(quiet=quiet) as progress:
        from prunus.cli.numbers import numbers
        from prunus.decoding.dola.options import Dola, parse_layers
        from prunus.errors import CalibrationError
        from prunus.evaluation.factual_data import source

        given = {name: value for name, value in options.items() if value is not None}
        how = Dola(
            layers=parse_layers(given.pop("dola", source(task).layers)),
            norm=given.pop("dola_norm", "none"),
            compat=given.pop("compat", "exact"),
        )
        limit = numbers({"limit": given.pop("limit", None)} if "limit" in given else {}, {"limit": int}).get("limit")
        file = given.pop("preamble", None)
        preamble: str | None = "" if file == "none" else None
        if file is not None and file != "none":
            try:
                preamble = Path(file).read_text("utf-8").rstrip("\n") + "\n\n"
            except (OSError, UnicodeDecodeError) as problem:
                raise CalibrationError(f"--preamble {file} cannot be read as text ({problem}).") from problem
        baseline = given.pop("baseline", None)
        # Only now, so that a slip of the pen is answered at once.
        from prunus.evaluation.factual import judge

        result = judge(
            model, task, Path(task_data), how, baseline=baseline, preamble=preamble, limit=limit, machine=given,
            progress=progress,
        )  # fmt: skip
    show(result, text, as_json=as_json)


def text(result: Mapping[str, Any]) -> str:
    """A row for each model, plain and contrasted, and which layers were chosen."""
    from prunus.text import table, wrap

    measured = [result["baseline"], result] if result.get("baseline") else [result]
    names = list(result["plain"])
    rows = []
    for one in measured:
        for kind, shown in (("plain", "plain"), ("contrasted", "DoLa"), ("gain", "gain")):
            rows.append((one["model"] if kind == "plain" else "", shown, *(_cell(one[kind][name]) for name in names)))
    dola = result["dola"]
    tokens = sum(result["chosen"].values()) or 1
    chosen = ", ".join(f"{layer}: {count / tokens:.0%}" for layer, count in result["chosen"].items())
    below = (
        f"{result['task']}, {result['items']} items, {result['preamble']} preamble, mean ± standard error. Premature "
        f"layers "
        f"{', '.join(map(str, dola['candidates']))} ({dola['norm']} norm, {dola['compat']}); chosen {chosen}."
    )
    body = table(("model", "scores", *names), rows, right=tuple(range(2, 2 + len(names))))
    return f"{body}\n\n{wrap(below)}"


def _cell(value: Mapping[str, float | None]) -> str:
    spread = "" if value["stderr"] is None else f" ± {value['stderr']:.3f}"
    return f"{value['mean']:.3f}{spread}"
