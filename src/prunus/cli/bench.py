"""`prunus bench`: speed beside honest baselines. `prunus doctor`: what can run here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prunus.cli.options import MACHINE, Json, Quiet, option, takes
from prunus.cli.session import show, working

EXAMPLES = {
    "bench": """
prunus bench packed
prunus bench pruned --values int4 --against hf-fp32,llama.cpp
prunus bench packed --against dense-int8 --tokens 128 --rounds 5 --json
""",
    "doctor": """
prunus doctor
prunus doctor --json
""",
}

WHAT = "What to measure"
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A packed folder; or any model, which is packed into a temporary folder first.",
    ),
]
BENCH = {
    "against": option(
        "--against NAMES",
        WHAT,
        "Baselines, by commas: hf-fp32, hf-bf16 (transformers), dense-fp32, dense-bf16, dense-int8 (our own loop with "
        "the zeros in place), llama.cpp (F16, Q8_0 and Q4_0), llama.cpp-k (Q3_K_M and Q2_K). One that is not installed "
        "is named and skipped. Default: hf-fp32,hf-bf16,dense-int8,llama.cpp.",
    ),
    "values": option(
        "--values KIND", WHAT, "What an ordinary folder is packed as: lossless, bf16, int8 or int4. Default: int8."
    ),
    "tokens": option("--tokens N", WHAT, "Tokens decoded in each round, at least 2. Default: 64."),
    "prompt": option("--prompt N", WHAT, "Tokens of the prompt that prefill reads, at least 2. Default: 128."),
    "rounds": option("--rounds N", WHAT, "Turns of every engine; their median counts. Default: 3."),
    "threads": option("--threads N", MACHINE, "Threads of every engine. Default: one for each core."),
}
NUMBERS: dict[str, type] = {"tokens": int, "prompt": int, "rounds": int, "threads": int}


@takes(BENCH)
def bench(model: Model, as_json: Json = False, quiet: Quiet = False, **options: Any) -> None:
    """Measure prefill and decode speed of MODEL in the packed engine, beside other engines on the same weights.

    Every engine has a process of its own; they take turns, so that a busy moment hits all of them.
    """
    with working(quiet=quiet) as progress:
        from prunus.bench.run import Setup
        from prunus.bench.run import bench as measure
        from prunus.bench.text import bench_text
        from prunus.cli.numbers import numbers
        from prunus.runtime.native import require

        given = {name: value for name, value in options.items() if value is not None}
        found = numbers({name: given.pop(name) for name in list(given) if name in NUMBERS}, NUMBERS)
        setup = Setup(**{"threads": require().threads, **found})
        if "against" in given:
            given["against"] = [name.strip() for name in given["against"].split(",") if name.strip()]
        result = measure(model, setup=setup, progress=progress, **given)
    show(result, bench_text, as_json=as_json)


def doctor(as_json: Json = False) -> None:
    """Say which kernels run on this machine, with how many threads, and which optional packages are there."""
    with working(quiet=True):
        from prunus.bench.doctor import doctor as look
        from prunus.bench.text import doctor_text

        result = look()
    show(result, doctor_text, as_json=as_json)
