"""`prunus evaluate`: perplexity of a model, with the dense one beside it if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from prunus.cli.options import MACHINE, Json, Quiet, option, spell, takes
from prunus.cli.session import show, working

EXAMPLES = {
    "evaluate": """
prunus evaluate out --baseline smollm2
prunus evaluate packed --engine packed --baseline smollm2
prunus evaluate out --text book.txt --length 512 --windows 20
prunus evaluate out --baseline smollm2 --probe markov
prunus evaluate out --sample "The tree in the garden" --json
prunus evaluate out --text none --tasks owl7 --task-data tasks --limit 200
"""
}

WHAT, TASKS = "What to measure", "Benchmark tasks (extra: tasks)"
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A folder, a hub id, a .gguf file or an alias such as smollm2."
    ),
]
EVALUATE = {
    "baseline": option(
        "--baseline MODEL",
        WHAT,
        "Evaluate this model too, first and on the same windows: usually the dense one. With --tasks it is found in "
        "MODEL's prunus.json unless given; none leaves it out.",
    ),
    "text": option(
        "--text NAME|FILE",
        WHAT,
        "wikitext2 (its test split, comes with prunus), a text file, or none for tasks alone. Default: wikitext2.",
    ),
    "length": option(
        "--length TOKENS",
        WHAT,
        "Tokens in each window, at least 2. Perplexities compare only at equal length. Default: 1024.",
    ),
    "windows": option("--windows N", WHAT, "Only the first N windows of the text, at least 1. Default: all."),
    "bos": option(
        "--bos WHEN",
        WHAT,
        "Begin each window with the BOS token: auto (where the tokenizer does), always or never. Default: auto.",
    ),
    "sample": option("--sample PROMPT", WHAT, "Also continue this prompt, greedily, by one sentence."),
    "probe": option(
        "--probe NAME",
        WHAT,
        "In place of perplexity: markov, how well the model learns random Markov chains that it reads.",
    ),
    "engine": option(
        "--engine NAME",
        MACHINE,
        "What computes MODEL: transformers, or packed (its own numbers, int8 activations and all; the baseline stays "
        "with transformers). Default: transformers.",
    ),
    "tasks": option(
        "--tasks NAMES",
        TASKS,
        "Benchmark tasks of lm-eval, such as arc_easy,hellaswag, or owl7: BoolQ, RTE, HellaSwag, WinoGrande, ARC-e, "
        "ARC-c and OBQA with their mean. The dense model is scored too, on the same items.",
    ),
    "task_data": option(
        "--task-data DIR",
        TASKS,
        "Read items from TASK.jsonl or TASK.SPLIT.jsonl in DIR, also .gz. Default: the hub's data sets.",
    ),
    "limit": option("--limit N", TASKS, "Only the first N items of each task, at least 1. Default: all."),
    "batch": option(
        "--batch N",
        TASKS,
        "Requests in one forward pass. More is faster on a GPU and may move the last digits. Default: 1, as lm-eval.",
    ),
    "device": option("--device DEVICE", MACHINE, "cpu, cuda or cuda:1. Default: cpu."),
    "dtype": option(
        "--dtype DTYPE",
        MACHINE,
        "Number format of the computation: float32, bfloat16, float16 or auto (float32 on a CPU, elsewhere that of the "
        "files). Default: auto.",
    ),
    "trust_remote_code": option(
        "--trust-remote-code", MACHINE, "Run Python code that a model's folder brings along; read it first."
    ),
}


@takes(EVALUATE)
def evaluate(model: Model, as_json: Json = False, quiet: Quiet = False, **options: Any) -> None:
    """Measure the perplexity of MODEL on a text: lower is better.

    The text is cut into windows of equal length without overlap; the mean over the windows is what
    papers report. Length, windows and text stand beside each number, because they change it.
    """
    with working(quiet=quiet) as progress:
        from prunus import report
        from prunus.recipe import EvaluatePart
        from prunus.recipe_options import EVALUATE_PLACES, from_options

        baseline, engine, probe = options.pop("baseline"), options.pop("engine"), options.pop("probe")
        if probe is not None:
            _refuse_beside_probe({**options, "engine": engine})
        recipe = from_options({"model": model, **options}, places=EVALUATE_PLACES, spell=spell(EVALUATE))
        part = (recipe.evaluate or EvaluatePart()).asked()
        machine = {name: getattr(recipe, name) for name in ("device", "dtype", "trust_remote_code")}
        # Only now, so that a slip of the pen is answered at once.
        if probe is None:
            from prunus.evaluation.perplexity import evaluate as measure

            machine["engine"] = engine or "transformers"
            result, text = measure(recipe.model, baseline=baseline, progress=progress, **part, **machine), None
        else:
            from prunus.forecasting.probe import probe as measure_probe

            result = measure_probe(probe, recipe.model, baseline=baseline, machine=machine, progress=progress)
            text = probe_text
    show(result, text or report.evaluate_text, as_json=as_json)


NOT_WITH_PROBE = ("text", "length", "windows", "bos", "sample", "engine", "tasks", "task_data", "limit", "batch")


def _refuse_beside_probe(options: dict[str, Any]) -> None:
    """A probe has its own text.

    Raises:
        RecipeError: an option of the perplexity beside it.
    """
    from prunus.errors import RecipeError

    given = [name for name in NOT_WITH_PROBE if options.get(name) is not None]
    if given:
        raise RecipeError(
            f"--probe brings its own numbers, so --{given[0].replace('_', '-')} has no effect; leave it out."
        )


def probe_text(result: Mapping[str, Any]) -> str:
    """What each model learned in context, and what simple methods would have."""
    from prunus.text import table, wrap

    measured = [result["baseline"], result] if result.get("baseline") else [result]
    rows = [
        (
            one["model"],
            f"{one['area']:.4f} ± {one['stderr']:.4f}",
            f"{one['end']:.4f}",
            f"{one['learned']:.1%}",
            f"t^-{one['exponent']:.2f} (R² {one['fit']:.2f})",
        )
        for one in measured
    ]
    rows.append(("who counts transitions", f"{result['counting']:.4f}", "", "", ""))
    rows.append(("who knows nothing", f"{result['uniform']:.4f}", "", "", ""))
    below = (
        f"Bhattacharyya distance to the true law of the next state, lower is better: mean over {result['chains']} "
        f"random chains of {result['states']} states and {result['length']} steps; end: over the last tenth."
    )
    columns = ("model", "distance", "end", "learned", "falls as")
    return f"{table(columns, rows, right=(1, 2, 3))}\n\n{wrap(below)}"
