"""`prunus inspect`: where the zeros of a checkpoint are, whoever made it."""

from __future__ import annotations

from typing import Annotated

import typer

from prunus.cli.options import RUN, Json, Quiet, option
from prunus.cli.session import show, working

EXAMPLES = {
    "inspect": """
prunus inspect out
prunus inspect out --matrices
prunus inspect out --json
"""
}

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A folder, a hub id, a .gguf file or an alias such as smollm2."
    ),
]
Matrices = Annotated[bool, option("--matrices", RUN, "One line for every matrix instead of one for every block.")]


def inspect(model: Model, matrices: Matrices = False, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show the sparsity of each block and matrix of MODEL, and which N:M patterns hold.

    Reads the stored tensors one at a time, by their names on disk, so it works for checkpoints that
    prunus did not make. An N:M pattern holds if every M consecutive inputs keep at most N weights.
    """
    with working(quiet=quiet) as progress:
        from prunus import report
        from prunus.inspection import inspect as look
        from prunus.models.source import find

        result = look(find(model), progress=progress)
    show(result, lambda found: report.inspect_text(found, matrices=matrices), as_json=as_json)
