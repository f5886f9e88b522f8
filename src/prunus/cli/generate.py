"""`prunus generate`: continue a prompt, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, TextIO

import typer

from prunus.cli.options import MACHINE, Json, Quiet, option, takes
from prunus.cli.session import show, working

EXAMPLES = {
    "generate": """
prunus generate smollm2 --prompt "The tree in the garden"
prunus generate smollm2 --prompt "The capital of France is" --dola high
prunus generate out --prompt "Once upon a time" --temperature 0.8 --seed 7
prunus generate packed --prompt "Once upon a time" --json
prunus generate out --prompt - --json < story.txt
"""
}

CHOICE = "Choice of tokens"
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A folder, a hub id, a .gguf file or an alias such as smollm2."
    ),
]
Prompt = Annotated[str, option("--prompt TEXT", CHOICE, "The beginning to continue; - reads it from standard input.")]
GENERATE = {
    "max_new_tokens": option("--max-new-tokens N", CHOICE, "At most so many tokens, at least 1. Default: 64."),
    "temperature": option(
        "--temperature T", CHOICE, "Draw tokens, with logits divided by T above 0; 0 takes the likeliest. Default: 0."
    ),
    "top_p": option(
        "--top-p P",
        CHOICE,
        "Draw from the smallest set of tokens with probability P together, above 0 and at most 1. Default: 1, all.",
    ),
    "top_k": option("--top-k N", CHOICE, "Draw from the N likeliest tokens, at least 1. Default: all."),
    "repetition_penalty": option(
        "--repetition-penalty R", CHOICE, "Divide the logits of tokens already seen by R, at least 1. Default: 1."
    ),
    "seed": option("--seed N", CHOICE, "Seed of the draw; the same seed draws the same text. Default: 0."),
    "dola": option(
        "--dola LAYERS",
        CHOICE,
        "Contrast the last layer with premature ones (DoLa): low (for long reasoning), high (for short facts), or "
        "numbers such as 16,18 or 16-30:2. The repetition penalty is then 1.2 unless given.",
    ),
    "dola_norm": option(
        "--dola-norm NORM",
        CHOICE,
        "none: the head reads premature layers as they are, as published; final: through the last norm. Default: none.",
    ),
    "compat": option(
        "--compat MODE",
        CHOICE,
        "exact: DoLa by the Jensen-Shannon divergence; published: what the published code computes in its place. "
        "Default: exact.",
    ),
    "engine": option(
        "--engine NAME",
        MACHINE,
        "What computes: transformers (any model, any device), or packed (compiled kernels on the CPU; an ordinary "
        "folder is packed on the fly, without loss). Default: packed for a packed folder, and for one that prunus made "
        "sparse (40 % zeros or more) where the kernels run it and no --dola, --device or --dtype asks for more; else "
        "transformers.",
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
NUMBERS: dict[str, type] = {
    "max_new_tokens": int, "temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "seed": int,
}  # fmt: skip


@takes(GENERATE)
def generate(model: Model, prompt: Prompt, as_json: Json = False, quiet: Quiet = False, **options: Any) -> None:
    """Continue a prompt with MODEL and print the text as it is made.

    Prints the prompt and its continuation; with --json, one object when done.
    """
    out = sys.stdout
    with working(quiet=quiet) as progress:
        from prunus.cli.numbers import numbers
        from prunus.decoding.sampling import Sampling

        given = {name: value for name, value in options.items() if value is not None}
        dola = _dola(given)
        how = Sampling(**numbers({name: given.pop(name) for name in list(given) if name in NUMBERS}, NUMBERS))
        text = _given() if prompt == "-" else prompt
        # Only now, so that a slip of the pen is answered at once.
        from prunus.decoding.text import generate as continue_text

        tell = None if as_json else _teller(out, text)
        result = continue_text(model, text, how, tell=tell, dola=dola, **given)
        if not as_json:
            out.write("\n")
            if not quiet:
                progress.close()
                print(_speed(result), file=sys.stderr)
    if as_json:
        show(result, lambda found: found["text"], as_json=True)


def _given() -> str:
    """What stands on standard input; bytes that are no text are kept as Python marks them, to be refused later."""
    raw = getattr(sys.stdin, "buffer", None)
    text = sys.stdin.read() if raw is None else raw.read().decode("utf-8", "surrogateescape")
    return text.rstrip("\n")


def _dola(given: dict[str, Any]) -> Any:
    """Takes DoLa's options out of `given`; None if it is not asked for.

    Raises:
        RecipeError: its other options without --dola.
    """
    from prunus.decoding.dola.options import Dola, parse_layers
    from prunus.errors import RecipeError

    layers = given.pop("dola", None)
    others = {new: given.pop(name) for name, new in (("dola_norm", "norm"), ("compat", "compat")) if name in given}
    if layers is None:
        if others:
            raise RecipeError("--dola-norm and --compat belong to --dola; give it too, or leave them out.")
        return None
    given.setdefault("repetition_penalty", "1.2")
    return Dola(parse_layers(layers), **others)


def _teller(out: TextIO, prompt: str) -> Callable[[str], None]:
    """Writes the prompt before the first piece, so that nothing is printed for a model that cannot be loaded."""
    begun = False

    def tell(piece: str) -> None:
        nonlocal begun
        out.write(piece if begun else prompt + piece)
        out.flush()
        begun = True

    return tell


def _speed(result: dict[str, Any]) -> str:
    ended = "end of text" if result["ended"] == "end" else "stopped at --max-new-tokens"
    speed = f", {result['tokens_per_second']:.1f} tokens a second" if result["tokens_per_second"] else ""
    chosen = ", ".join(f"{layer}: {count}" for layer, count in (result["dola"] or {}).get("chosen", {}).items())
    layers = f" DoLa's premature layers: {chosen}." if chosen else ""
    return f"{result['tokens']} tokens{speed}; {ended}.{layers}"
