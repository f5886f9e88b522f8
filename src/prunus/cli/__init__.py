"""The command line: `prunus`. Nothing heavy is imported before a command runs, so that help answers at once."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from prunus import __version__
from prunus.cli import bench, catalogue, evaluate, export, forecast, generate, inspect, prune, run, score
from prunus.cli.pages import Page, Pages
from prunus.errors import PrunusError

EXAMPLES = """
prunus plan smollm2                      what would happen
prunus prune smollm2 out                 remove half of the weights
prunus evaluate out --baseline smollm2   what it cost
prunus inspect out                       where the zeros are
"""

# In the order of use, each with its line on the first page.
COMMANDS = {
    "prune": (prune.prune, "Set weights of MODEL to zero and write OUT."),
    "plan": (prune.plan, "Say what prune would do; reads no weights."),
    "evaluate": (evaluate.evaluate, "Measure perplexity, beside the dense model's."),
    "generate": (generate.generate, "Continue a prompt, token by token."),
    "score": (score.score, "Does it prefer what is true: TruthfulQA, FACTOR, DoLa."),
    "forecast": (forecast.forecast, "Predict where a logged number is going."),
    "inspect": (inspect.inspect, "Show where the zeros of a checkpoint are."),
    "export": (export.export, "Write a model in a form that another tool runs."),
    "bench": (bench.bench, "Measure speed beside other engines."),
    "doctor": (bench.doctor, "Say what can run on this machine."),
    "run": (run.run, "Do all stages of a recipe."),
    "methods": (catalogue.methods, "List what there is to choose from."),
    "schema": (catalogue.schema, "Print the JSON schema of recipes."),
}

app = typer.Typer(cls=Pages, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
for name, (command, line) in COMMANDS.items():
    examples = sys.modules[command.__module__].EXAMPLES[name]
    app.command(name, cls=Page, short_help=line, epilog=examples)(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"prunus {__version__}")
        raise typer.Exit


@app.callback(epilog=EXAMPLES)
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Prune Hugging Face language models, one block at a time, on any machine.

    MODEL is a folder, a hub id, a .gguf file or an alias such as smollm2.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after `prunus`; those of the process unless given.

    Returns:
        0 done; 2 the user's mistake, said in one sentence on standard error; 130 interrupted; 1 our fault.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return app(words, prog_name="prunus", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):  # before or after the work, which says more (`session.working`)
        print("prunus: Interrupted.", file=sys.stderr)
        return 130
    except PrunusError as error:
        return _refuse(str(error))
    except TyperException as error:
        return _refuse(_usage(error))
    except SystemExit as error:  # the reader of our output went away
        return error.code if isinstance(error.code, int) else 1
    except Exception:
        traceback.print_exc()
        print("prunus: this is a fault of prunus, not yours. Please report it with the lines above.", file=sys.stderr)
        return 1


def _refuse(text: str) -> int:
    print("\n".join(f"prunus: {line}" for line in text.splitlines()), file=sys.stderr)
    return 2


def _usage(error: TyperException) -> str:
    """One sentence for a wrong option or a missing argument, with the page that helps."""
    text = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{text}{'' if text.endswith('?') else '.'} See `{context.command_path if context else 'prunus'} --help`."
