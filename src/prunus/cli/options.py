"""Options as tables: a row is a name, what is shown in help, and the section it stands in."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import OptionInfo

if TYPE_CHECKING:
    from prunus.recipe import Recipe

WHAT, TEXT, MACHINE, RUN = "What to remove", "Calibration", "Machine", "This run"


def option(shown: str, section: str, text: str) -> OptionInfo:
    """`shown` is `--flag METAVAR`, or `--flag` alone for a switch; `text` names the default and why it is that."""
    flag, _, metavar = shown.partition(" ")
    return typer.Option(flag, metavar=metavar or None, help=text, rich_help_panel=section, show_default=False)


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
Json = Annotated[bool, option("--json", RUN, "Print one JSON object on standard output and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=RUN)]

# Values stay text here: the recipe checks them, once, and names the option in its sentence.
RECIPE: dict[str, OptionInfo] = {
    "preset": option(
        "--preset NAME",
        WHAT,
        "fast, balanced or best: a method, an allocation and their settings as one choice (`prunus methods`). Instead "
        "of --method.",
    ),
    "method": option(
        "--method NAME",
        WHAT,
        "A method of `prunus methods`. Default: wanda, the best first choice up to half: one pass over a little text, "
        "no matrix inversion. sparsegpt costs more time and memory and keeps more quality from there on.",
    ),
    "sparsity": option(
        "--sparsity SHARE",
        WHAT,
        "Share of the blocks' weights to remove, at least 0 and below 1. Default: 0.5, or what an N:M pattern fixes.",
    ),
    "params": option(
        "--params COUNT",
        WHAT,
        "Parameters that the result shall have, such as 100M, instead of a sparsity; for methods that make tensors "
        "smaller.",
    ),
    "size": option("--size BYTES", WHAT, "Bytes of weights that the result shall have, such as 80MB, likewise."),
    "speedup": option(
        "--speedup FACTOR",
        WHAT,
        "How many times as fast as the dense model the result shall decode, such as 1.3, likewise: in transformers, in "
        "float32, on this machine. Stand-ins of smaller shapes are timed until one does; the result is timed again.",
    ),
    "portable": option(
        "--portable",
        WHAT,
        "Give all blocks one shape that a stock class of transformers holds, so that every tool loads the result; for "
        "methods that make tensors smaller. Where no class does, it is refused with what would.",
    ),
    "round_to": option(
        "--round-to N", WHAT, "Keep neurons or ranks in multiples of N, such as 32, which kernels like. Default: 1."
    ),
    "pattern": option(
        "--pattern PATTERN",
        WHAT,
        "unstructured; N:M: N kept of every M consecutive inputs, such as 2:4 or 4:8; capped:K/M: at most K of them, "
        "such as capped:6/16. Default: unstructured.",
    ),
    "allocation": option(
        "--allocation NAME",
        WHAT,
        "How the sparsity is divided over the blocks: a name of `prunus methods`. Default: uniform.",
    ),
    "metric": option("--metric NAME", WHAT, "Score the weights by this metric instead of the method's own."),
    "update": option("--update NAME", WHAT, "Correct the kept weights by this update instead of the method's own."),
    "settings": option(
        "--set KEY=VALUE",
        WHAT,
        "A hyper-parameter, such as update.damp=0.01 or allocation.span=0.08. Repeatable; `prunus methods --json` "
        "lists them.",
    ),
    "ignore": option(
        "--ignore GLOB",
        WHAT,
        "Leave matrices with these names alone, such as '*.o_proj' or '*.layers.0'. Repeatable; a glob that matches "
        "nothing is an error.",
    ),
    "blocks": option(
        "--blocks PATH",
        WHAT,
        "Path of the list of blocks in the model, such as transformer.h; only where prunus asks for it.",
    ),
    "compat": option(
        "--compat MODE",
        WHAT,
        "exact: the counts asked for, to the weight. reference: the published code's rounding, to match published "
        "numbers. Default: exact.",
    ),
    "calibration": option(
        "--calibration NAME|FILE",
        TEXT,
        "wikitext2 (comes with prunus), a .txt, .jsonl or .parquet file (or .gz of it), a .npy of token ids [samples, "
        "length], or a data set of the hub, such as c4. Default: wikitext2.",
    ),
    "samples": option("--samples N", TEXT, "Sequences drawn from it, at least 1. Default: 128, or all rows of a .npy."),
    "length": option(
        "--length TOKENS", TEXT, "Tokens in each sequence, at least 2. Default: 512, or the rows' length in a .npy."
    ),
    "seed": option("--seed N", TEXT, "Seed of the draw; the same seed draws the same tokens. Default: 0."),
    "bos": option(
        "--bos WHEN",
        TEXT,
        "Begin each sequence with the BOS token: auto (where the tokenizer does), always or never. Default: auto.",
    ),
    "device": option("--device DEVICE", MACHINE, "Where blocks are computed: cpu, cuda or cuda:1. Default: cpu."),
    "dtype": option(
        "--dtype DTYPE",
        MACHINE,
        "Number format of the forward passes: float32, bfloat16, float16 or auto (float32 on a CPU, elsewhere that of "
        "the files). The checkpoint keeps its own. Default: auto.",
    ),
    "trust_remote_code": option(
        "--trust-remote-code", MACHINE, "Run Python code that the model's folder brings along; read it first."
    ),
    "max_ppl_ratio": option(
        "--max-ppl-ratio R",
        RUN,
        "Publish nothing if the perplexity is more than R times the dense model's, R above 1; measured on the first 4 "
        "windows of wikitext2, or of the recipe's `evaluate`, with either model whole in memory. Default: only warn.",
    ),
    "recipe": option(
        "--recipe FILE", RUN, "YAML with any of these; options given here override it. `prunus schema` describes it."
    ),
}
REPEATED = ("settings", "ignore")


def takes(table: Mapping[str, OptionInfo]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every option of a table, behind its arguments; it receives them by name, None where not given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [param for param in own.parameters.values() if param.kind is not param.VAR_KEYWORD]
        arguments = [param for param in kept if param.name in ("model", "out", "log", "files")]
        rows = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[_kind(name, row), row], default=None
            )
            for name, row in table.items()
        ]
        params = [*arguments, *rows, *(param for param in kept if param not in arguments)]
        params = [param.replace(kind=inspect.Parameter.KEYWORD_ONLY) for param in params]

        @functools.wraps(command)
        def with_options(**options: Any) -> None:
            command(**{name: value if value != [] else None for name, value in options.items()})

        # typer reads both.
        vars(with_options)["__signature__"] = own.replace(parameters=params)
        with_options.__annotations__ = {param.name: param.annotation for param in params}
        return with_options

    return decorate


def _kind(name: str, row: OptionInfo) -> Any:
    if name in REPEATED:
        return list[str]
    return str | None if row.metavar else bool | None


def spell(table: Mapping[str, OptionInfo]) -> dict[str, str]:
    """How a user knows each option, for complaints: `settings` -> `--set`."""
    # Inside `Annotated`, typer keeps the flag where it otherwise keeps the default.
    return {"model": "MODEL", "out": "OUT", **{name: str(row.default) for name, row in table.items()}}


def to_recipe(options: dict[str, Any]) -> Recipe:
    """The recipe that the options of `RECIPE` describe.

    Raises:
        RecipeError: an option, or the file given with --recipe, says something that a recipe cannot.
    """
    from prunus.recipe_options import from_options, parse_settings

    file = options.pop("recipe")
    if options["settings"] is not None:
        options["settings"] = parse_settings(options["settings"])
    return from_options(options, file=file, spell=spell(RECIPE))
