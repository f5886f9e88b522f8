"""`prunus forecast`: where is a logged number going."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from prunus.cli.options import MACHINE, Json, Quiet, option, takes
from prunus.cli.session import show, working

EXAMPLES = {
    "forecast": """
prunus forecast recovery.csv --model smollm2
prunus forecast out/recovery.jsonl --column loss --model out --json
"""
}

WHAT = "What to forecast"
Log = Annotated[
    str,
    typer.Argument(
        metavar="LOG",
        show_default=False,
        help="A CSV file with a header, or one JSON object a line; a row every n steps.",
    ),
]
Reader = Annotated[
    str,
    option("--model MODEL", WHAT, "Reads the log: a folder, a hub id, a .gguf file or an alias; also a pruned one."),
]
FORECAST = {
    "column": option("--column NAME", WHAT, "Which number. Default: loss, or the only one."),
    "points": option("--points N", WHAT, "Read the last N values, at least 40. Default: all that fit, at most 1,000."),
    "digits": option(
        "--digits N", WHAT, "Digits of a value, 1 to 3. Default: 2, or 3 where three digits are one token."
    ),
    "within": option(
        "--within SHARE", WHAT, "So near the limit counts as there: a share of the values' range. Default: 0.05."
    ),
    "temperature": option(
        "--temperature T", WHAT, "Divide the digits' logits by T above 0; above 1 makes the laws flatter. Default: 1."
    ),
    "extrapolate": option(
        "--extrapolate HOW",
        WHAT,
        "Rows beyond all values seen: shift copies the nearest, moved by the distance; hold copies it. Default: shift.",
    ),
    "device": option("--device DEVICE", MACHINE, "cpu, cuda or cuda:1. Default: cpu."),
    "dtype": option("--dtype DTYPE", MACHINE, "float32, bfloat16, float16 or auto. Default: auto (float32 on a CPU)."),
    "trust_remote_code": option(
        "--trust-remote-code", MACHINE, "Run Python code that a model's folder brings along; read it first."
    ),
}
NUMBERS: dict[str, type] = {"points": int, "digits": int, "within": float, "temperature": float}
OWN = (*NUMBERS, "extrapolate")


@takes(FORECAST)
def forecast(log: Log, model: Reader, as_json: Json = False, quiet: Quiet = False, **options: Any) -> None:
    """Predict where a number of LOG is going, from how a language model continues it.

    The model reads the numbers as text; the probabilities of its next digits are a Markov kernel,
    and that has a limit. The last quarter of the log is held back first and forecast by the model
    and by simple methods; the result says who was better. Advice, not a gate.
    """
    with working(quiet=quiet) as progress:
        from prunus.cli.numbers import numbers

        given = numbers({name: value for name, value in options.items() if value is not None}, NUMBERS)
        from prunus.forecasting.forecast import Options
        from prunus.forecasting.forecast import forecast as foretell

        column = given.pop("column", None)
        wanted = Options(**{name: given.pop(name) for name in OWN if name in given})
        result = foretell(log, model, column=column, options=wanted, machine=given, progress=progress)
    show(result, text, as_json=as_json)


def text(result: Mapping[str, Any]) -> str:
    """The limit and the time to it, who forecast better, and what to look out for."""
    from prunus.text import pairs, table, wrap

    limit, arrival = result["limit"], result["arrival"]
    steps = "never" if math.isinf(arrival["steps"]) else f"{arrival['steps']:,.0f} steps"
    ahead = result["held"] * result["every"]
    facts = {
        "last value": f"{result['last']:.6g}",
        "limit": f"{limit['mean']:.6g} (90 % of the time between {limit['low']:.6g} and {limit['high']:.6g})",
        "on the way": f"{steps} until within {arrival['within']:.3g} of it for the first time",
        "memory": f"forgets in {result['relaxation']:,.1f} steps (spectral gap {result['gap']:.4f})",
        "surprise": ", ".join(f"{name} {value:.2f}" for name, value in result["surprise"].items()) + " nats a value",
        "read": f"{result['read']} of {result['rows']} values, {result['visited']} of {result['states']} states seen, "
        f"{result['tokenizer']} tokens",
    }
    rows = [
        (
            name,
            f"{method['rmse']:.4g}",
            "" if name == "model" else f"{result['skill'][name]:+.2f}",
            f"{method['forecast']:.6g}",
        )
        for name, method in sorted(result["methods"].items(), key=lambda item: item[1]["rmse"])
    ]
    columns = ("method", f"error on {result['held']} held back", "model's skill", f"in {ahead:,.0f} steps")
    warnings = [wrap(f"Warning: {warning}") for warning in result["warnings"]]
    head = f"Forecast of {result['column']} in {result['log']} by {result['model']}"
    return "\n\n".join([head, pairs(facts), table(columns, rows, right=(1, 2, 3)), wrap(result["verdict"]), *warnings])
