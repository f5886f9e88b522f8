"""`prunus export`: the same model in a form that another tool runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prunus.cli.options import MACHINE, Json, Quiet, option, takes
from prunus.cli.prune import Overwrite
from prunus.cli.session import show, working

EXAMPLES = {
    "export": """
prunus export out portable --format hf --portable
prunus export out model.gguf --format gguf
prunus export out model-q8.gguf --format gguf --type q8_0
prunus export out packed --format packed --values int8
prunus export packed back --format dense
"""
}

AS = "What to write"
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A folder, a hub id, a .gguf file or an alias such as smollm2."
    ),
]
Out = Annotated[
    str, typer.Argument(metavar="OUT", show_default=False, help="New folder; for --format gguf a new .gguf file.")
]
EXPORT = {
    "format": option(
        "--format NAME",
        AS,
        "hf: a Hugging Face folder; of a stock class where one fits, else with a small modelling file inside. "
        "gguf: one file for llama.cpp. packed: a folder smaller by what was pruned, for prunus itself. dense: what "
        "packed was made of. Default: hf.",
    ),
    "portable": option(
        "--portable",
        AS,
        "With hf: only what stock tools load, no code in the folder. Blocks of unequal widths are filled up with zeros "
        "to one width; where no stock class fits, it is refused.",
    ),
    "type": option("--type TYPE", AS, "With gguf: f32, f16, bf16 or q8_0. Default: the one nearest to what is stored."),
    "values": option(
        "--values KIND",
        AS,
        "With packed: lossless (bfloat16 where it holds every weight, else float32), bf16, int8 or int4 (one scale for "
        "every 128 columns of a row; embeddings and head as int8). Default: lossless.",
    ),
    "trust_remote_code": option(
        "--trust-remote-code", MACHINE, "Run Python code that the model's folder brings along; read it first."
    ),
}


@takes(EXPORT)
def export(
    model: Model, out: Out, overwrite: Overwrite = False, as_json: Json = False, quiet: Quiet = False, **options: Any
) -> None:
    """Write MODEL in a form that another tool runs, and check it by loading it again.

    A form that cannot carry the model's shape, or that would lose a bias, is refused with what could.
    """
    with working(quiet=quiet) as progress:
        from prunus import report
        from prunus.errors import RecipeError
        from prunus.formats import Settings
        from prunus.formats.run import export as write

        kind = options.pop("format") or "hf"
        values = options.pop("values")
        if values is not None and options["type"] is not None:
            raise RecipeError("--values is the --type of packed folders; give one of them.")
        options["type"] = values or options["type"]
        settings = Settings(**{name: value for name, value in options.items() if value is not None})
        result = write(model, out, kind, settings, overwrite=overwrite, progress=progress)
    show(result, report.export_text, as_json=as_json)
