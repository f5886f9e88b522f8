"""The experiment about recoveries: every case of pruning × every recovery, for the same work, judged on held-out text.

    python experiments/recover.py --stage screen --minutes 5 --text c4.jsonl --work W --out R.jsonl
    python experiments/recover.py --stage leaders --minutes 30 --text c4.jsonl --work W --out R.jsonl
    python scripts/recovery_table.py R.jsonl

Each run is a line of JSON, written when it is done; what the file already holds is not run again, so the same command
goes on after any interruption. Every run is a process of its own: its peak memory is its own, and one that dies leaves
a line, too. `--hours` stops after a run, to go on another day. The second stage takes the best recoveries of each case
from the first.

The work of a run is `--minutes` of training, or, where the clock says little (a machine that others use), `--steps` of
`--batch` sequences: recoveries of the whole model take so many steps, local ones pass as many sequences through each
part.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from grid import read

import prunus
from prunus import memory
from prunus.distributed import Processes
from prunus.errors import PrunusError
from prunus.evaluation.perplexity import evaluate
from prunus.notes import collecting
from prunus.progress import Silent
from prunus.recipe import Recipe
from prunus.recovery import RECOVERIES
from prunus.recovery.job import prepare
from prunus.recovery.reconstruct import Reconstruct
from prunus.recovery.run import check_zeros
from prunus.versions import versions

_SHARES = {"50": {"sparsity": 0.5}, "60": {"sparsity": 0.6}, "70": {"sparsity": 0.7}, "2:4": {"pattern": "2:4"}}
# Name → `prune` of the recipe. An allocation of N:M would mix groups, so 2:4 is uniform.
CASES: dict[str, dict[str, Any]] = {
    **{f"magnitude {name}": {"method": "magnitude", **share} for name, share in _SHARES.items()},
    **{f"wanda {name}": {"method": "wanda", **share} for name, share in _SHARES.items()},
    **{
        f"sparsegpt+owl {name}": {"method": "sparsegpt", **share, **({} if ":" in name else {"allocation": "owl"})}
        for name, share in _SHARES.items()
    },
    "flap 20": {"method": "flap", "sparsity": 0.2},
    "quarter cut": {"method": "last-quarter", "sparsity": 0.25},
}
# Name → `recover` of the recipe: every method by itself, and some taught by the dense model.
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in RECOVERIES},
    "masklora, logits": {"method": "masklora", "objective": "logits"},
    "full, logits": {"method": "full", "objective": "logits"},
    "full, hidden": {"method": "full", "objective": "hidden"},
}
EXTRA = {"biases": {"biases.create": True}, "imp": {"rounds": 2}}
# Sequences that a local method needs at least, and is first timed with.
FEW = 8
# Of the command line, what a row's numbers depend on.
ASKED = ("minutes", "steps", "batch", "most", "length", "dtype", "calibrated", "window", "windows", "tasks", "limit")
# IMP prunes the dense model itself, by magnitude: it stands beside magnitude pruning of the same sparsity.
ITERATED = {name: p["sparsity"] for name, p in CASES.items() if name.startswith("magnitude") and "sparsity" in p}


def runs(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Case and recovery of every run of the stage, the pruned model itself first."""
    for case in arguments.cases:
        yield case, "none"
        ways = arguments.ways if arguments.stage == "screen" else leaders(read(arguments.out), case, arguments.top)
        yield from ((case, way) for way in ways if way != "imp" or case in ITERATED)


def leaders(rows: list[dict[str, Any]], case: str, top: int) -> list[str]:
    """The recoveries of a case with the lowest perplexity on the first text in the first stage."""
    found = [row for row in rows if row["stage"] == "screen" and row["case"] == case and "perplexity" in row]
    found = [row for row in found if row["recovery"] != "none"]
    return [row["recovery"] for row in sorted(found, key=first)[:top]]


def first(row: dict[str, Any]) -> float:
    """Perplexity on the first text; infinite if it is no number."""
    value = next(iter(row["perplexity"].values()))
    return value if math.isfinite(value) else math.inf


def run(arguments: argparse.Namespace) -> None:
    """Do what is missing in the result file."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    name = Path(arguments.model).name
    if others := {row["model"] for row in read(arguments.out)} - {name}:
        raise SystemExit(f"{arguments.out} holds rows of {', '.join(sorted(others))}; give {name} a file of its own.")
    done = {(row["stage"], row["case"], row["recovery"]) for row in read(arguments.out)}
    begun = time.monotonic()
    for case, way in [("dense", "none"), *runs(arguments)]:
        if (arguments.stage, case, way) in done:
            continue
        if time.monotonic() - begun > 3600 * arguments.hours:
            print("time is up; the same command goes on")
            return
        row = {"stage": arguments.stage, "case": case, "recovery": way, "model": name}
        row |= apart(arguments, case, way) | {"asked": asked(arguments), "versions": versions()}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = row.get("perplexity", row.get("refused"))
        print(f"{case:18s} {way:18s} {shown}", flush=True)


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about the work of a run and about judging it, without places on this machine."""
    said = {key: value for key, value in vars(arguments).items() if key in ASKED}
    return said | {"text": Path(arguments.text).name, "judge": [Path(text).name for text in arguments.judge]}


def apart(arguments: argparse.Namespace, case: str, way: str) -> dict[str, Any]:
    """The result of one run, from a process of its own."""
    context = get_context("fork")  # nothing was computed yet: the child begins with what was imported
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, arguments, case, way))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        found = {"refused": f"the process died with status {process.exitcode}"}
    process.join()
    return found


def _send(pipe: Any, arguments: argparse.Namespace, case: str, way: str) -> None:
    try:
        pipe.send(_one(arguments, case, way))
    except PrunusError as refused:
        pipe.send({"refused": str(refused)})


def _one(arguments: argparse.Namespace, case: str, way: str) -> dict[str, Any]:
    if case == "dense":
        return judged(arguments, Path(arguments.model)) | {"seconds": {"recover": 0.0, "cpu": 0.0}}
    pruned = arguments.work / f"{Path(arguments.model).name}-{case.replace(' ', '-').replace(':', 'of')}"
    if not pruned.exists():
        calibration = {"calibration": arguments.text, "samples": arguments.calibrated, "length": arguments.length}
        prunus.prune(arguments.model, pruned, **CASES[case], **calibration)
    if way == "none":
        return judged(arguments, pruned) | {"seconds": {"recover": 0.0, "cpu": 0.0}}
    if way == "imp":
        return recovered(arguments, Path(arguments.model), way, {"sparsity": ITERATED[case]})
    return recovered(arguments, pruned, way, {})


def recovered(arguments: argparse.Namespace, pruned: Path, way: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Recover and judge; the files are written and their zeros counted, but not published.

    A local method under `--minutes` is first given a few sequences, and then as many as fit.

    Args:
        arguments: of the command line.
        pruned: the folder.
        way: a name of `WAYS`.
        settings: hyper-parameters of the case.
    """
    local = isinstance(RECOVERIES[WAYS[way]["method"]], Reconstruct)
    asked = {**WAYS[way], "text": arguments.text, "length": arguments.length, "heldout": 8, "dense": arguments.model}
    few = {} if local or way == "imp" else {"judgements": 3}
    asked |= {"settings": {**few, **EXTRA.get(way, {}), **settings}, "allow_dense": way == "imp"}
    if not local:
        asked |= {"batch": arguments.batch, "steps": arguments.steps}
        asked |= {} if arguments.steps else {"minutes": arguments.minutes}
    elif arguments.steps:
        passes = arguments.steps * arguments.batch // RECOVERIES[WAYS[way]["method"]].epochs  # type: ignore[attr-defined]
        asked["samples"] = max(FEW, min(arguments.most, passes))
    else:
        pace = FEW / _done(arguments, pruned, asked | {"samples": FEW})["seconds"]["recover"]
        asked["samples"] = max(FEW, min(arguments.most, int(60 * arguments.minutes * pace)))
    return _done(arguments, pruned, asked, judge=True)


def _done(arguments: argparse.Namespace, pruned: Path, asked: dict[str, Any], judge: bool = False) -> dict[str, Any]:
    """One recovery; what an interrupted one has finished is not done again, and its time is not counted."""
    warnings: list[str] = []
    recipe = Recipe.model_validate({"model": str(pruned), "recover": asked, "dtype": arguments.dtype})
    said = json.dumps(recipe.resolved(), sort_keys=True).encode()
    folder = arguments.work / f"run-{sha256(said).hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    with collecting(warnings):
        job = prepare(recipe, folder / "out", overwrite=False, processes=Processes(), warnings=warnings)
        resumed = job.work.training.is_dir() or (job.work.folder / "done").is_dir()
        job.begin(restart=False)
        try:
            begun, cpu = time.perf_counter(), time.process_time()
            outcome = job.recovery.recover(job, Silent())
            seconds = {"recover": time.perf_counter() - begun, "cpu": time.process_time() - cpu}
            found = {
                "seconds": seconds, "trainable": outcome.trainable,
                "trainable_share": outcome.trainable / job.parameters, "peak_rss_bytes": memory.peak(),
                "loss": {"before": outcome.before, "after": outcome.after}, "zeros": check_zeros(job),
                "resumed": resumed, "sequences": len(job.lessons.train), "length": job.lessons.train.ids.shape[1],
                "facts": {key: outcome.facts.get(key) for key in ("steps", "lr", "best_step", "stopped", "apart")},
            }  # fmt: skip
            # What lies beside the weights is judged by nobody who loads the folder.
            if judge and not outcome.facts.get("apart"):
                found |= judged(arguments, job.work.checkpoint)
            return found | {"warnings": warnings}
        finally:
            job.work.close()
            if not isinstance(sys.exception(), KeyboardInterrupt):
                shutil.rmtree(folder)


def judged(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Perplexity on every text, and the tasks."""
    found: dict[str, Any] = {"perplexity": {}}
    for text in arguments.judge:
        result = evaluate(folder, text=text, length=arguments.window, windows=arguments.windows)
        found["perplexity"][Path(text).stem] = result["perplexity"]
    if arguments.tasks:
        result = evaluate(
            folder, baseline="none", text="none", tasks=arguments.tasks, task_data=arguments.task_data,
            limit=arguments.limit, batch=4,
        )  # fmt: skip
        found["tasks"] = {name: one["acc"] for name, one in result["tasks"].items()}
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=["screen", "leaders"], default="screen")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--work", type=Path, default=Path("recover-work"), help="keeps the pruned models")
    parser.add_argument("--text", default="wikitext2", help="what is calibrated and trained with")
    parser.add_argument("--judge", nargs="+", default=["wikitext2"], help="texts to judge by, the first decides")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--task-data", default=None)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--most", type=int, default=128, help="sequences of a local method at most")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="of the recovery's forward passes; judged is in float32")
    parser.add_argument("--calibrated", type=int, default=32, help="sequences that the pruning is calibrated with")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--hours", type=float, default=math.inf)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
