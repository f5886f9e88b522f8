"""The options that describe a recipe, in one table, for every command that takes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer


def option(flag: str, metavar: str, section: str, text: str, kind: Any = str | None) -> Any:
    """An `Annotated` option: `flag METAVAR  text` in its section; None (or an empty list) unless given."""
    # One word for the metavar, shown as it is.
    return Annotated[kind, typer.Option(flag, metavar=metavar, help=text, rich_help_panel=section, show_default=False)]


WHAT, TEXT, MACHINE, RUN = "What to remove", "Calibration", "Machine", "This run"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        show_default=False,
        help="A folder, a hub id, a .gguf file or an alias such as smollm2. May stand in the recipe instead.",
    ),
]
Out = Annotated[
    str | None,
    typer.Argument(
        metavar="[OUT]",
        show_default=False,
        help="New folder for the pruned checkpoint. May stand in the recipe instead.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object on standard output and nothing else there.", rich_help_panel=RUN
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=RUN)]

# Values stay text here: the recipe checks them, once, and names the option in its sentence.
RECIPE: dict[str, Any] = {
    "method": option(
        "--method",
        "NAME",
        WHAT,
        "A method of `prunus methods`. Default: wanda, the best first choice up to half: one pass over a little "
        "text, no matrix inversion. sparsegpt costs more time and memory and keeps more quality from there on.",
    ),
    "sparsity": option(
        "--sparsity",
        "SHARE",
        WHAT,
        "Share of the blocks' weights to remove, at least 0 and below 1. Default: 0.5, or what an N:M pattern fixes.",
    ),
    "pattern": option(
        "--pattern",
        "PATTERN",
        WHAT,
        "unstructured, or N:M: N kept of every M consecutive inputs, such as 2:4 or 4:8. Default: unstructured.",
    ),
    "allocation": option(
        "--allocation",
        "NAME",
        WHAT,
        "How the sparsity is divided over the blocks: a name of `prunus methods`. Default: uniform.",
    ),
    "metric": option("--metric", "NAME", WHAT, "Score the weights by this metric instead of the method's own."),
    "update": option("--update", "NAME", WHAT, "Correct the kept weights by this update instead of the method's own."),
    "settings": option(
        "--set",
        "KEY=VALUE",
        WHAT,
        "A hyper-parameter, such as update.damp=0.01 or allocation.span=0.08. Repeatable; `prunus methods --json` "
        "lists them.",
        list[str],
    ),
    "ignore": option(
        "--ignore",
        "GLOB",
        WHAT,
        "Leave matrices with these names alone, such as '*.o_proj' or '*.layers.0'. Repeatable; a glob that "
        "matches nothing is an error.",
        list[str],
    ),
    "blocks": option(
        "--blocks",
        "PATH",
        WHAT,
        "Path of the list of blocks in the model, such as transformer.h; only where prunus asks for it.",
    ),
    "compat": option(
        "--compat",
        "MODE",
        WHAT,
        "exact: the counts asked for, to the weight. reference: the published code's rounding, to match published "
        "numbers. Default: exact.",
    ),
    "calibration": option(
        "--calibration",
        "NAME|FILE",
        TEXT,
        "wikitext2 (comes with prunus), a .txt, .jsonl or .parquet file (or .gz of it), a .npy of token ids "
        "[samples, length], or a data set of the hub. Default: wikitext2.",
    ),
    "samples": option(
        "--samples", "N", TEXT, "Sequences drawn from it, at least 1. Default: 128, or all rows of a .npy."
    ),
    "length": option(
        "--length", "TOKENS", TEXT, "Tokens in each sequence, at least 2. Default: 512, or the rows' length in a .npy."
    ),
    "seed": option("--seed", "N", TEXT, "Seed of the draw; the same seed draws the same tokens. Default: 0."),
    "bos": option(
        "--bos",
        "WHEN",
        TEXT,
        "Begin each sequence with the BOS token: auto (where the tokenizer does), always or never. Default: auto.",
    ),
    "device": option(
        "--device", "DEVICE", MACHINE, "Where blocks are computed: cpu, cuda, cuda:1, mps or xpu. Default: cpu."
    ),
    "dtype": option(
        "--dtype",
        "DTYPE",
        MACHINE,
        "Number format of the forward passes: auto, float32, bfloat16 or float16. The checkpoint keeps its own. "
        "Default: auto.",
    ),
    "trust_remote_code": Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code that the model's folder brings along; read it first.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ],
    "recipe": option(
        "--recipe", "FILE", RUN, "YAML with any of these; options given here override it. `prunus schema` describes it."
    ),
}

SPELL = {
    **{name: f"--{name.replace('_', '-')}" for name in RECIPE},
    "settings": "--set",
    "model": "MODEL",
    "out": "OUT",
}


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every option of `RECIPE`; it receives them as keyword arguments, None where not given."""
    own = inspect.signature(command, eval_str=True)
    kept = [param for param in own.parameters.values() if param.kind is not param.VAR_KEYWORD]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)
        for name, kind in RECIPE.items()
    ]
    first = [param for param in kept if param.name in ("model", "out")]
    params = [*first, *shared, *(param for param in kept if param not in first)]

    @functools.wraps(command)
    def with_options(**options: Any) -> None:
        command(**{name: value if value != [] else None for name, value in options.items()})

    params = [param.replace(kind=inspect.Parameter.KEYWORD_ONLY) for param in params]
    with_options.__signature__ = own.replace(parameters=params)  # type: ignore[attr-defined]
    with_options.__annotations__ = {param.name: param.annotation for param in params}
    return with_options


def to_recipe(options: dict[str, Any]) -> Any:
    """The recipe that the options describe.

    Raises:
        RecipeError: an option, or the file given with --recipe, says something that a recipe cannot.
    """
    from prunus.recipe_options import from_options, parse_settings

    file = options.pop("recipe")
    if options["settings"] is not None:
        options["settings"] = parse_settings(options["settings"])
    return from_options(options, file=file, spell=SPELL)
