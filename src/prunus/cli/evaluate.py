"""`prunus evaluate`: perplexity of a model, with the dense one beside it if asked."""

from __future__ import annotations

from typing import Annotated

import typer

from prunus.cli.options import MACHINE, Json, Quiet, option
from prunus.cli.session import show, working

EXAMPLES = {
    "evaluate": """
prunus evaluate out --baseline smollm2
prunus evaluate out --text book.txt --length 512 --windows 20
prunus evaluate out --sample "The tree in the garden" --json
"""
}

WHAT = "What to measure"
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A folder, a hub id, a .gguf file or an alias such as smollm2."
    ),
]
Baseline = option(
    "--baseline", "MODEL", WHAT, "Evaluate this model too, first and on the same windows: usually the dense one."
)
Text = option(
    "--text", "NAME|FILE", WHAT, "wikitext2 (its test split, comes with prunus) or a text file. Default: wikitext2."
)
Length = option(
    "--length",
    "TOKENS",
    WHAT,
    "Tokens in each window, at least 2. Perplexities compare only at equal length. Default: 1024.",
)
Windows = option("--windows", "N", WHAT, "Only the first N windows of the text, at least 1. Default: all.")
Bos = option(
    "--bos",
    "WHEN",
    WHAT,
    "Begin each window with the BOS token: auto (where the tokenizer does), always or never. Default: auto.",
)
Sample = option("--sample", "PROMPT", WHAT, "Also continue this prompt, greedily, by one sentence.")
Device = option("--device", "DEVICE", MACHINE, "cpu, cuda, cuda:1, mps or xpu. Default: cpu.")
Dtype = option(
    "--dtype", "DTYPE", MACHINE, "Number format of the computation: auto, float32, bfloat16 or float16. Default: auto."
)

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that a model's folder brings along; read it first.",
        rich_help_panel=MACHINE,
    ),
]


def evaluate(  # noqa: PLR0913 - each is an option
    model: Model,
    baseline: Baseline = None,
    text: Text = None,
    length: Length = None,
    windows: Windows = None,
    bos: Bos = None,
    sample: Sample = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the perplexity of MODEL on a text: lower is better.

    The text is cut into windows of equal length without overlap; the mean over the windows is what
    papers report. Length, windows and text stand beside each number, because they change it.
    """
    with working(quiet=quiet) as progress:
        from prunus import report
        from prunus.evaluation.perplexity import evaluate as measure
        from prunus.recipe import EvaluatePart
        from prunus.recipe_options import EVALUATE_PLACES, from_options

        given = {"model": model, "text": text, "length": length, "windows": windows, "bos": bos, "sample": sample}
        given |= {"device": device, "dtype": dtype}
        recipe = from_options(given, places=EVALUATE_PLACES, spell={name: f"--{name}" for name in given})
        part = (recipe.evaluate or EvaluatePart()).model_dump(exclude={"baseline"})
        machine = {"device": recipe.device, "dtype": recipe.dtype, "trust_remote_code": trust_remote_code}
        result = measure(model, baseline=baseline, progress=progress, **part, **machine)
    show(result, report.evaluate_text, as_json=as_json)
