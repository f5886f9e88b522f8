"""Perplexity against decode speed and file size: packed variants of a model beside llama.cpp's of the same model.

    python benchmarks/frontier.py run --folder SCRATCH [--model smollm2] [--windows 16] [--only lossless,int8]
    python benchmarks/frontier.py plot [--model smollm2]

`run` adds rows to `benchmarks/results/frontier.jsonl`; what is there is skipped, so it can be stopped at any moment. A
packed row is pruned by `--method`, exported, read by its own engine on the first windows of WikiText-2's test split
and timed by `prunus bench`. Rows of llama.cpp are GGUF files of the dense model, by llama.cpp's own quantiser without
an importance matrix; it reads the same tokens. Every timing stands beside the dense int8 loop in the same run
(`beside`); `speed` is tokens a second as a multiple of it, which is what rows of different runs can be compared by.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import prunus
from prunus.bench.llama import prepare
from prunus.bench.run import Setup, bench
from prunus.data.reading import read
from prunus.errors import PrunusError
from prunus.evaluation.perplexity import evaluate
from prunus.evaluation.windows import cut
from prunus.formats.llama_run import run_llama
from prunus.models.source import locate
from prunus.runtime.native import require
from prunus.versions import decisive

HERE = Path(__file__).parent
RESULTS, PICTURES = HERE / "results" / "frontier.jsonl", HERE.parent / "docs"
LENGTH = 256  # tokens of a window, the longest that `run_llama` reads
SPARSITIES, VALUES = (0.5, 0.6, 0.7), ("lossless", "int8", "int4")
# A cap a third above the mean, columns in an order that deals heavy ones over the windows.
CAPS = {0.5: 10, 0.6: 8, 0.7: 6}
QUANTISED = ("f16", "q8_0", "q4_0", "q3_k", "q2_k")


def patterns(sparsity: float) -> dict[str, dict[str, Any]]:
    """Name -> options of `prunus.prune`."""
    capped = {"pattern": f"capped:{CAPS[sparsity]}/16", "settings": {"pattern.permute": True}}
    return {"unstructured": {}, "capped permuted": capped}


class Rows:
    """The file of results.

    Attributes:
        model: whose rows are made.
        common: what all of them are measured under.
    """

    def __init__(self, file: Path, model: str, common: dict[str, Any]) -> None:
        self.file, self.model, self.common = file, model, common

    def has(self, name: str) -> bool:
        """Whether a row was made under the same conditions."""
        wanted = {"model": self.model, "name": name, **self.common}
        return any({key: row.get(key) for key in wanted} == wanted for row in read_rows(self.file))

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Write a row down."""
        line = {"model": self.model, "name": name, **row, **self.common}
        line |= {"processor": platform.processor(), "threads": require().threads, "versions": decisive()}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(f"{name}: perplexity {row['perplexity']:.2f}, {row['tokens_per_second'] or math.nan:.1f} tokens/s, "
              f"{row['file_bytes'] / 1e6:.1f} MB", flush=True)  # fmt: skip


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of the file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def tensors_bytes(folder: Path) -> int:
    """Of the weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def decoding(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Engine -> its decode row."""
    return {row["engine"]: row for row in found["rows"] if row["phase"] == "decode"}


def timed(rows: dict[str, dict[str, Any]], engine: str) -> dict[str, Any]:
    """Speed of an engine beside the dense int8 loop of the same run; empty where it could not be measured."""
    if engine not in rows:
        return {"tokens_per_second": None, "beside": None, "speed": None, "note": "not measured"}
    own, beside = rows[engine]["tokens_per_second"], rows["dense-int8"]["tokens_per_second"]
    return {"tokens_per_second": own, "beside": beside, "speed": own / beside, "note": rows[engine]["note"]}


def packed_rows(source: Path, given: argparse.Namespace, rows: Rows, text: dict[str, Any]) -> None:
    """Every sparsity with every pattern is pruned once and packed with each kind of values."""
    for sparsity in given.sparsities:
        for pattern, options in patterns(sparsity).items():
            left = [kind for kind in given.only if not rows.has(f"{100 * sparsity:g} % {pattern}, {kind}")]
            if not left:
                continue
            pruned, packed = given.folder / "pruned", given.folder / "packed"
            prunus.prune(
                source, pruned, method=given.method, sparsity=sparsity, samples=given.samples, overwrite=True, **options
            )
            for kind in left:
                prunus.export(pruned, packed, format="packed", type=kind, overwrite=True)
                row = {"group": f"{kind}, {pattern}", "sparsity": sparsity, "values": kind, "pattern": pattern}
                row |= packed_row(packed, kind, given, text)
                rows.add(f"{100 * sparsity:g} % {pattern}, {kind}", row)
            shutil.rmtree(packed)
            shutil.rmtree(pruned)


def packed_row(folder: Path, kind: str, given: argparse.Namespace, text: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a packed folder."""
    judged = evaluate(folder, engine="packed", **text)
    found = decoding(bench(folder, against=["dense-int8"], setup=setup(given)))
    engine = next(name for name in found if name.startswith("packed-"))
    return {"perplexity": judged["perplexity"], "file_bytes": tensors_bytes(folder), **timed(found, engine)}


def dense_rows(source: Path, given: argparse.Namespace, rows: Rows, text: dict[str, Any]) -> None:
    """The dense model in transformers and in our own int8 loop, and llama.cpp's files, all timed in one run."""
    names = {"transformers, float32": "hf-fp32", "dense, int8": "dense-int8"}
    names |= {f"llama.cpp {kind.upper()}": f"llama.cpp-{kind}" for kind in QUANTISED}
    if all(rows.has(name) for name in names):
        return
    against = ["dense-int8", "hf-fp32", "llama.cpp", "llama.cpp-k"]
    found = decoding(bench(source, against=against, values="int8", setup=setup(given)))
    if "dense-int8" not in found:
        raise SystemExit("The dense int8 loop, beside which all is measured, did not run; see `prunus doctor`.")
    # Files of an earlier call may be of another model, or half of one.
    shutil.rmtree(given.folder / "gguf", ignore_errors=True)
    for name, engine in names.items():
        if rows.has(name):
            continue
        group = "llama.cpp, dense" if name.startswith("llama.cpp") else name
        try:
            row = MADE.get(engine, gguf)(source, given, text, engine.removeprefix("llama.cpp-"))
            row.setdefault("file_bytes", found.get(engine, {}).get("file_bytes"))
        except PrunusError as problem:
            print(f"{name}: {problem}", flush=True)
            continue
        speed = timed(found, engine)
        if engine not in found and row.get("note"):  # else the bench, which made the file too, said the same
            speed["note"] += f"; {row['note']}"
        rows.add(name, {"group": group, "sparsity": 0.0, **row, **speed})
    shutil.rmtree(given.folder / "gguf", ignore_errors=True)


def transformers(source: Path, given: argparse.Namespace, text: dict[str, Any], kind: str) -> dict[str, Any]:
    """The model as it is."""
    return {"perplexity": evaluate(source, **text)["perplexity"], "file_bytes": tensors_bytes(source)}


def dense_int8(source: Path, given: argparse.Namespace, text: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same rounding as of packed int8, with no weight left out: perplexity by the packed engine."""
    folder = given.folder / "dense-int8"
    prunus.export(source, folder, format="packed", type="int8", overwrite=True)
    judged = evaluate(folder, engine="packed", **text)
    shutil.rmtree(folder)
    # Without a bitmap: one byte for each weight and a float16 scale for 128, as the loop holds it and the bench says.
    return {"perplexity": judged["perplexity"]}


def gguf(source: Path, given: argparse.Namespace, text: dict[str, Any], kind: str) -> dict[str, Any]:
    """A file of llama.cpp on the tokens of the same windows."""
    folder = given.folder / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    note = prepare(source, folder, kind)
    file = folder / f"model-{kind}.gguf"
    plan = cut(read(text["text"], purpose="evaluation"), source, LENGTH, "auto")
    pairs = [plan.pair(number) for number in range(text["windows"])]
    losses = []
    for inputs, targets in pairs:
        _, (logits,) = run_llama(file, [], [inputs[0].tolist()])
        losses.append(torch.nn.functional.cross_entropy(logits[: len(targets)].double(), targets).item())
    return {"perplexity": math.exp(math.fsum(losses) / len(losses)), "file_bytes": file.stat().st_size, "note": note}


MADE: dict[str, Callable[..., dict[str, Any]]] = {"hf-fp32": transformers, "dense-int8": dense_int8}


def setup(given: argparse.Namespace) -> Setup:
    """How much is timed."""
    return Setup(tokens=given.tokens, prompt=16, rounds=given.rounds, threads=require().threads)


def run(given: argparse.Namespace) -> None:
    """Make the rows that are missing."""
    source = locate(given.model)
    given.folder.mkdir(parents=True, exist_ok=True)
    text = {"text": given.text, "length": LENGTH, "windows": given.windows}
    common = {"windows": given.windows, "length": LENGTH, "text": Path(given.text).name}
    common |= {"method": given.method, "samples": given.samples}
    rows = Rows(given.results, given.model, common)
    dense_rows(source, given, rows, text)
    packed_rows(source, given, rows, text)


# --- the picture ---------------------------------------------------------------------------------------------------

COLOURS = ("#2f6db3", "#c4561c", "#2c8a5c", "#7b52b5", "#b23a5e", "#8a6d10")
OTHERS = {"llama.cpp, dense": "#1c2024", "dense, int8": "#60666d", "transformers, float32": "#a0a6ad"}


def plot(given: argparse.Namespace) -> None:
    """Two panels: perplexity against speed and against size."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "frontier", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = [row for row in read_rows(given.results) if row["model"] == given.model]
    if not rows:
        raise SystemExit(f"There are no rows of {given.model} in {given.results}; make them by `run`.")
    if len({tuple(row[key] for key in ("windows", "length", "text", "method", "samples")) for row in rows}) > 1:
        raise SystemExit(f"The rows of {given.model} in {given.results} were not measured alike.")
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    groups = list(dict.fromkeys(row["group"] for row in rows))
    colours = dict(OTHERS) | dict(zip([group for group in groups if group not in OTHERS], itertools.cycle(COLOURS)))
    axes = figure.subplots(1, 2, sharey=True)
    sides = (("speed", 1.0, "decode speed, times the dense int8 loop"), ("file_bytes", 1e6, "weights on disk, MB"))
    for panel, (key, unit, words) in zip(axes, sides, strict=True):
        for group in groups:
            members = sorted(_within(rows, group, key), key=lambda row: row[key])
            xs, ys = [row[key] / unit for row in members], [row["perplexity"] for row in members]
            style = "s" if group in OTHERS else "o-"  # a line joins sparsities, not formats
            panel.plot(xs, ys, style, color=colours[group], ms=4, lw=1.2, label=group)
            for row, x, y in zip(members, xs, ys, strict=True):
                panel.annotate(_short(row), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6.5)
        panel.set_xlabel(words)
        panel.set_yscale("log")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: f"{value:,.3g}"))
        panel.margins(0.1)
        panel.grid(color="#dfe3e8", lw=0.6)
    axes[0].set_ylabel(f"perplexity, {rows[0]['windows']} windows of {rows[0]['length']} tokens")
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(given.out, metadata={"Date": None, "Title": f"{given.model}: perplexity, speed and size"})
    print(f"{given.out}: {given.out.stat().st_size / 1e3:.0f} kB")


def _within(rows: list[dict[str, Any]], group: str, key: str) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["group"] == group and row.get(key) is not None)


def _short(row: dict[str, Any]) -> str:
    return f"{100 * row['sparsity']:g} %" if row["sparsity"] else row["name"].removeprefix("llama.cpp ").split(",")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "plot"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--folder", type=Path, help="for what is made on the way")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help="the picture; default: docs/frontier-MODEL.svg")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    listed = "by commas"
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(VALUES), help=f"values, {listed}")
    parser.add_argument(
        "--sparsities", type=lambda text: [float(one) for one in text.split(",")], default=list(SPARSITIES), help=listed
    )
    given = parser.parse_args()
    given.out = given.out or PICTURES / f"frontier-{Path(given.model).name}.svg"
    if given.command == "run" and given.folder is None:
        parser.error("run needs --folder")
    {"run": run, "plot": plot}[given.command](given)


if __name__ == "__main__":
    main()
