"""The parts of a page as HTML. Everything that comes from a file or a model goes through `esc`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from prunus.progress import clock
from prunus.recipe_yaml import dump_yaml
from prunus.text import bytes_text
from prunus.webpage.gather import Run
from prunus.webpage.plots import dense_scores, label, names_of, share

# The folders of a path within a sentence, and not those of an address, a share or a hub's name.
FOLDERS = re.compile(r"(?<![\w./:~-])[~.]{0,2}/(?:[^\s/\"'“”<>|:;,()]+/)*(?=[^\s/])")
NONE = '<span class="muted">–</span>'


def esc(value: Any) -> str:
    """Text in which HTML means nothing."""
    return escape(str(value), quote=True)


def number(value: float | None, digits: int = 2) -> str:
    """`1234.5` -> `1,234.50`; very large ones in powers of ten; a dash where there is none."""
    if value is None:
        return NONE
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"


def public(name: Any) -> str:
    """Of a path the last part: a page is shown around, and the maker's folders are nobody's business."""
    text = str(name or "")
    return Path(text).name if text.startswith(("/", ".", "~")) else text


def spoken(text: Any) -> str:
    """A sentence, with of every path in it the last part."""
    return FOLDERS.sub("", str(text))


def unplaced(value: Any) -> Any:
    """The same data with `public` names in place of paths."""
    if isinstance(value, Mapping):
        return {key: unplaced(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [unplaced(item) for item in value]
    return public(value) if isinstance(value, str) else value


def rows_table(head: Sequence[tuple[str, str]], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table: `head` has (class, text) of each column, `rows` (class, cells as HTML); the first cell is a heading."""
    top = "".join(f'<th scope="col" class="{kind}">{esc(text)}</th>' for kind, text in head)
    body = []
    for kind, cells in rows:
        first, *others = cells
        cols = "".join(f'<td class="{column}">{cell}</td>' for (column, _), cell in zip(head[1:], others, strict=True))
        body.append(f'<tr class="{kind}"><th scope="row">{first}</th>{cols}</tr>')
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def dot(run: Run, runs: Sequence[Run]) -> str:
    """The colour that the plots give to a run's series."""
    index = names_of(runs).index(label(run, runs)) % 8 + 1
    return f'<span class="dot" style="--c: var(--series-{index})"></span>'


def denses(runs: Sequence[Run]) -> list[tuple[str, Mapping[str, Any]]]:
    """Model and dense evaluation, one for each model and way of asking that has one."""
    found = {run.question(run.dense): (run.model, run.dense) for run in reversed(runs) if run.dense}
    return list(reversed(found.values()))


def overview(runs: Sequence[Run]) -> str:
    """Every run in one table, the dense models first; the best of each sparsity is bold."""
    divided = any(run.part.get("allocation", "uniform") != "uniform" for run in runs)
    noted = any(run.why for run in runs)
    head = [("", "recipe"), ("n", "removed"), ("n", "perplexity"), ("n", "× dense")]
    head += [("", "allocation")] * divided + [("wrap", "")] * noted
    rows = [
        ("dense", [f"dense {esc(model)}", NONE, number(one.get("perplexity")), "1.00", *[""] * (divided + noted)])
        for model, one in denses(runs)
    ]
    best = best_runs(runs)
    for run in runs:
        kind = "best" if any(run is one for one in best) else ""
        cells = [dot(run, runs) + esc(run.name), NONE if run.reached is None else share(run.reached)]
        cells += [f'<span class="{kind}">{number(value)}</span>' for value in (run.perplexity, run.ratio)]
        cells += [esc(run.part.get("allocation", ""))] * divided + [remark(run)] * noted
        rows.append(("", cells))
    return rows_table(head, rows)


def remark(run: Run) -> str:
    """Why a run did not come to its end, in full; a note of one that did, its first words (all of it stands below)."""
    if run.status != "done":
        return f'<span class="bad">{esc(run.status)}: {esc(spoken(run.why))}</span>'
    return f'<span class="warn">{esc(spoken(run.why).partition(":")[0])}</span>'


def best_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs with the lowest perplexity, each among those that removed as much and were asked the same.

    None where there is no rival, or where two share the lowest. A run that collapsed is a rival, but never the best.
    """
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.ratio is not None and run.reached is not None:
            # Counts are rounded down within rows for some patterns, so what is shown as equal is taken as equal.
            found.setdefault((run.asked, share(run.reached)), []).append(run)
    best = []
    for rivals in found.values():
        first, *others = sorted(rivals, key=lambda run: run.ratio or 0)
        if others and first.status == "done" and (others[0].ratio or 0) > (first.ratio or 0):
            best.append(first)
    return best


def facts(runs: Sequence[Run]) -> str:
    """The few numbers that a reader wants first, as cards."""
    cards: list[tuple[str, str, str]] = []
    for model, one in denses(runs):
        if one.get("perplexity") is not None:
            cards.append((f"dense {model}", number(one["perplexity"]), "perplexity"))
    if len(runs) == 1:
        run = runs[0]
        cards += [] if run.reached is None else [("removed", share(run.reached), "of the blocks' weights")]
        cards += [] if run.perplexity is None else [("pruned", number(run.perplexity), "perplexity")]
        cards += [] if run.ratio is None else [("against dense", f"{run.ratio:.3g}×", "perplexity")]
        seconds = (run.prune.get("seconds") or {}).get("total")
        cards += [] if seconds is None else [("took", clock(seconds), "minutes and seconds")]
    else:
        best = sorted(best_runs(runs), key=lambda run: run.reached or 0)
        several = len({run.model for run in runs}) > 1
        cards += [
            (
                f"best at {share(run.reached or 0)}" + (f", {run.model}" if several else ""),
                f"{run.ratio:.3g}×",
                f"dense perplexity, by {run.series}",
            )
            for run in best[:4]
        ]
    items = "".join(f"<div><dt>{esc(a)}</dt><dd>{esc(b)}<small>{esc(c)}</small></dd></div>" for a, b, c in cards)
    return f'<dl class="facts">{items}</dl>' if cards else ""


def tasks(runs: Sequence[Run]) -> str:
    """A table for each task's accuracy with its error, and in words whether it is worse than the dense model."""
    known = [run for run in runs if run.scores]
    names = list(dict.fromkeys(name for run in known for name in run.scores))
    head = [("", "task"), ("", "model"), ("n", "acc"), ("n", "acc_norm"), ("n", "change, points"), ("", "verdict")]
    rows = []
    for name in names:
        lines = [
            ("dense", [esc(model), score(one, "acc"), score(one, "acc_norm"), NONE, ""])
            for model, one in dense_scores(known, name)
        ]
        for run in known:
            if name in run.scores:
                one = run.scores[name]
                cells = [dot(run, runs) + esc(run.name), score(one, "acc"), score(one, "acc_norm")]
                lines.append(("", [*cells, *change(one)]))
        rows += [(kind, [esc(name) if place == 0 else "", *cells]) for place, (kind, cells) in enumerate(lines)]
    return rows_table(head, rows)


def score(one: Mapping[str, Any], metric: str) -> str:
    """`0.584 ±0.010`."""
    if one.get(metric) is None:
        return NONE
    error = one.get("stderr" if metric == "acc" else f"{metric}_stderr")
    return f"{one[metric]:.3f}" + ("" if error is None else f' <span class="se">±{error:.3f}</span>')


def change(one: Mapping[str, Any]) -> list[str]:
    """The change in points with its interval, and the verdict."""
    versus = one.get("versus")
    if not versus:
        return [NONE, ""]
    low, high = 100 * versus["low"], 100 * versus["high"]
    kind = {"worse": "bad", "better": "good"}.get(versus["verdict"], "")
    points = f'{100 * versus["difference"]:+.1f} <span class="se">{low:+.1f} to {high:+.1f}</span>'
    return [points, f'<span class="{kind}">{esc(versus["verdict"])}</span>']


def sizes(runs: Sequence[Run]) -> str:
    """What is stored, what pruning took, and what a benchmark measured where its file lies beside the run."""
    head = [("", "recipe"), ("n", "dense"), ("n", "written"), ("n", "pruning took"), ("n", "peak memory")]
    rows = []
    for run in (run for run in runs if run.prune):
        size, seconds = run.prune.get("size") or {}, (run.prune.get("seconds") or {}).get("total")
        peak = run.prune.get("peak_rss_bytes")
        cells = [NONE if size.get(key) is None else bytes_text(size[key]) for key in ("dense_bytes", "out_bytes")]
        cells += [NONE if seconds is None else clock(seconds), NONE if peak is None else bytes_text(peak)]
        rows.append(("", [dot(run, runs) + esc(run.name), *cells]))
    return (rows_table(head, rows) if rows else "") + speeds(runs)


def speeds(runs: Sequence[Run]) -> str:
    """Rows of `bench.json`, what `prunus bench --json` prints; empty where no run has one."""
    head = [
        ("", "recipe"), ("", "engine"), ("", "phase"), ("n", "tokens/s"), ("n", "bytes/token"), ("n", "file"),
        ("n", "peak memory"),
    ]  # fmt: skip
    rows = []
    for run in runs:
        for one in run.bench.get("rows") or ():
            amounts = [one.get(key) for key in ("bytes_per_token", "file_bytes", "peak_rss_bytes")]
            cells = [esc(one.get("engine", "?")), esc(one.get("phase", "?")), number(one.get("tokens_per_second"), 1)]
            cells += [NONE if amount is None else bytes_text(amount) for amount in amounts]
            rows.append(("", [dot(run, runs) + esc(run.name), *cells]))
    return rows_table(head, rows) if rows else ""


def samples(runs: Sequence[Run]) -> str:
    """What each model writes, the dense ones first."""
    texts = dict.fromkeys((model, one["sample"]) for model, one in denses(runs) if one.get("sample"))
    said = [("dense", f"dense {model}", text) for model, text in texts]
    said += [("", run.name, run.evaluate["sample"]) for run in runs if run.evaluate.get("sample")]
    items = "".join(f'<div class="{kind}"><b>{esc(name)}</b><q>{esc(text)}</q></div>' for kind, name, text in said)
    return f'<div class="samples">{items}</div>' if said else ""


def provenance(run: Run) -> str:
    """The recipe as YAML, and all that the numbers hang on."""
    calibration, found = run.prune.get("calibration") or {}, run.evaluate
    facts: dict[str, Any] = {
        "calibration": " ".join(f"{key} {value}" for key, value in calibration.items() if key != "sha256"),
        "tokens, sha256": calibration.get("sha256"),
        "text": public(found.get("text")),
        "text, sha256": found.get("text_sha256"),
        "windows": f"{found['windows']} of {found['length']} tokens" if found.get("windows") else None,
        "tasks": " ".join(f"{key} {value}" for key, value in (found.get("asked") or {}).items() if key != "files"),
        "computed in": " on ".join(str(run.prune[key]) for key in ("dtype", "device") if run.prune.get(key)),
        "versions": ", ".join(f"{name} {one}" for name, one in (run.prune.get("versions") or {}).items()),
        "model, sha256": ", ".join(str(value) for value in (run.fingerprint.get("model") or {}).values()),
    }
    facts["note"] = spoken(run.why)
    facts |= {f"warning {place}": spoken(text) for place, text in enumerate(run.prune.get("warnings") or (), start=1)}
    items = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in facts.items() if value)
    recipe = esc(dump_yaml(unplaced(run.recipe)))
    return f'<details><summary>{esc(run.name)}</summary><pre>{recipe}</pre><dl class="plain">{items}</dl></details>'
