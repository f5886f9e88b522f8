"""Results as text for people: the data first, these words second. Every function takes what `--json` prints."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prunus.evaluation_text import evaluate_text
from prunus.progress import clock
from prunus.text import bytes_text, pairs, percent, table, wrap

Result = Mapping[str, Any]

LOADERS = {
    "transformers": "stock transformers",
    "code": "transformers and the modelling file in the folder",
    "prunus": "prunus (stock classes have no place for its shapes)",
}


def prune_text(result: Result) -> str:
    """What was removed, what it took, what it buys and what to do next."""
    sparsity, size = result["sparsity"], result.get("size", {})
    facts = {
        "removed": f"{percent(sparsity['reached'])} of the weights of {len(result['blocks'])} blocks"
        + (f", {percent(sparsity['model'])} of the whole model" if sparsity.get("model") is not None else ""),
        "blocks": _spread(result["blocks"]),
        "calibrated": calibration_line(result.get("calibration")) or "not needed: the weights alone decide",
        "took": _took(result["seconds"]),
        "memory": _memory(result),
        "checked": _checked(result.get("verify")),
        "size": _size(size),
    }
    how = f"{result['method']} ({result['pattern']}, {result['allocation']})"
    head = f"Pruned {result['model']} with {how} into {result['out']}"
    if result.get("shapes"):
        facts["checked"] = _checked(result.get("verify"), result.get("loads", "transformers"))
        facts["parameters"] = _parameters(result)
        facts["speed"] = _speedup(result.get("speedup"))
    elif sparsity["wanted"] - sparsity["reached"] > 5e-4:
        facts["asked for"] = f"{percent(sparsity['wanted'])}; counts are rounded down in every row or group"
    parts = [head, pairs(facts), *_warnings(result.get("warnings")), buys(result)]
    out, dense = shlex.quote(str(result["out"])), shlex.quote(str(result["model"]))
    # No prompt sign: a line that can be copied. Perplexity is of causal language models alone.
    short = result.get("positions") or 1024
    length = f" --length {short}" if short < 1024 else ""  # windows of 1,024 tokens do not fit
    parts.append(
        f"Next:\n  prunus {f'evaluate {out} --baseline {dense}{length}' if causal(result) else f'inspect {out}'}"
    )
    return "\n\n".join(parts)


def export_text(result: Result) -> str:
    """What was written, what it holds, and how it was checked."""
    facts = {"holds": result["holds"], "size": bytes_text(result["bytes"]), "checked": result["check"]["line"]}
    head = f"Wrote {result['model']} as {result['format']} to {result['out']}"
    use = [f"Use it:\n  {result['use']}"] if result.get("use") else []
    return "\n\n".join([head, pairs(facts), *_warnings(result.get("notes")), *use])


def plan_text(result: Result) -> str:
    """What would be touched, the budget, what is left alone, and what it would take."""
    sites, sparsity, disk = result["sites"], result["sparsity"], result["disk"]
    facts = {
        "would remove": "what it takes"
        if sparsity["wanted"] is None
        else f"{percent(sparsity['wanted'])} of {sites['parameters']:,} weights",
        "from": f"{sites['count']:,} matrices in {len(result['blocks'])} blocks, which hold {percent(sites['share'])} "
        f"of the model's {result['parameters']:,} parameters",
        "method": method_line(result),
        "budget": _budget_line(result),
        "left alone": _left_alone(result["left_alone"]),
        "calibration": calibration_line(result["calibration"]) or "none needed",
        "peak memory": _terms(result["memory"]),
        "disk": f"{bytes_text(disk['needed'])} in {disk['where']}, {bytes_text(disk['free'])} free",
        "time": _time_line(result["time"]),
    }
    parts = [f"Plan for {result['model']} (no weights were read)", pairs(facts)]
    if result["budget"] == "per block":
        rows = [(block["name"], f"{block['parameters']:,}", f"{block['sparsity']:.4f}") for block in result["blocks"]]
        parts.append(table(("block", "weights", "sparsity"), rows, right=(1, 2)))
    return "\n\n".join([*parts, *_warnings(result.get("notes"), "Note"), buys(result)])


def inspect_text(result: Result, *, matrices: bool = False) -> str:
    """Sparsity by block, or by matrix, and what else the files say."""
    items = result["blocks"]
    if matrices:
        items = [matrix for block in items for matrix in block["matrices"]]
    rows = [
        (
            item["name"],
            "x".join(map(str, item["shape"])) if matrices else f"{item['parameters']:,}",
            f"{item['sparsity']:.4f}",
            ", ".join(_telling(item)) + (" (stored transposed)" if item.get("axis") == "rows" else ""),
        )
        for item in items
    ]
    zeros = f"{percent(result['pruned_share'])} of the weights inside blocks are zero"
    head = f"{result['model']}: {zeros}, {percent(result['sparsity'])} of all {result['parameters']:,} parameters"
    columns = ("matrix" if matrices else "block", "shape" if matrices else "weights", "sparsity", "holds")
    listing = table(columns, rows, right=(1, 2)) if rows else "No matrix lies inside a numbered block."
    notes = pairs({"made by": _provenance(result["provenance"]), "look out": _oddities(result)})
    return "\n\n".join(part for part in (wrap(head), listing, notes) if part)


def _telling(item: Result) -> list[str]:
    """Patterns worth showing: those that account for the zeros, and 2:4, which hardware knows.

    Of a few random zeros some loose pattern such as 13:16 always holds; it says nothing.
    """
    from prunus.inspection import EXPLAINED, tightest

    def share(pattern: str) -> float:
        kept, group = map(int, pattern.split(":"))
        return kept / group

    most = 1 - item["sparsity"] + EXPLAINED
    return tightest([pattern for pattern in item["patterns"] if share(pattern) <= most or pattern == "2:4"])


def methods_text(result: Result) -> str:
    """The registries as one table, kind by kind; presets first, with what they stand for."""
    presets = [row for row in result["methods"] if row["kind"] == "preset"]
    made = [[row["defaults"].get(axis) for axis in ("method", "update", "allocation")] for row in presets]
    rows = [
        (row["name"], ", ".join(part for part in parts if part not in (None, "uniform")), row["purpose"])
        for row, parts in zip(presets, made, strict=True)
    ]
    tables = [table(("preset", "stands for", "purpose"), rows)]
    for kind in dict.fromkeys(row["kind"] for row in result["methods"] if row["kind"] != "preset"):
        rows = [
            (row["name"], ", ".join(row["needs"]) or "weights alone", row["paper"])
            for row in result["methods"]
            if row["kind"] == kind
        ]
        tables.append(table((f"{kind}", "needs", "paper"), rows))
    return "\n\n".join(tables)


def run_text(result: Result) -> str:
    """The stages of a recipe, those that were already done named as such."""
    parts = []
    if "prune" in result["skipped"]:
        pruned = result["prune"]
        parts.append(
            f"{pruned['out']} is complete for this recipe ({percent(pruned['sparsity']['reached'])} removed): not "
            "pruned again."
        )
    else:
        parts.append(prune_text(result["prune"]).partition("\n\nNext:")[0])
    if result.get("recover"):
        from prunus.recovery.report import recover_text

        text = recover_text(result["recover"]).partition("\n\nNext:")[0]
        parts.append(("The recovery was already there:\n\n" if "recover" in result["skipped"] else "") + text)
    if result["evaluate"]:
        done = "The evaluation was already there:\n\n" if "evaluate" in result["skipped"] else ""
        parts.append(done + evaluate_text(result["evaluate"]))
    return "\n\n".join(parts)


def causal(result: Result) -> bool:
    """True for models that predict the next token, by the name of their class; also where that is not known."""
    return str(result.get("architecture") or "ForCausalLM").endswith(("ForCausalLM", "LMHeadModel"))


def buys(result: Result) -> str:
    """What the pattern gives at run time today, and what it does not."""
    if result.get("shapes"):
        return wrap(f"What it buys: {_smaller(result)}")
    pattern = result["pattern"]
    stored = (
        "The zeros are stored like any other number: the files stay as large as the dense model's, and transformers, "
        "vLLM and llama.cpp run them no faster."
    )
    if pattern.startswith("capped:"):
        gain = "A cap on every window makes prunus' own runtime fast: prunus export OUT PACKED --format packed."
    elif ":" not in pattern:
        gain = (
            "Unstructured zeros keep the most quality at a given sparsity. prunus' own runtime leaves them out: prunus "
            "export OUT PACKED --format packed, then prunus bench PACKED."
        )
    elif not _same_everywhere(result):
        group = pattern.partition(":")[2]
        gain = (
            f"The allocation gives each block its own N of every {group}, so the model as a whole is not {pattern}: no "
            "stock runtime executes such a mixture."
        )
    elif pattern == "2:4":
        gain = (
            "2:4 is the one pattern that GPUs execute (NVIDIA, Ampere and later, through torch.sparse); current vLLM "
            "no longer does. On CPUs it gains nothing over unstructured 50 % where we measured it, and costs quality."
        )
    else:
        gain = (
            f"No stock runtime executes {pattern}. prunus' own leaves the zeros out: prunus export OUT PACKED --format "
            "packed, then prunus bench PACKED."
        )
    return wrap(f"What it buys: {stored} {gain}")


def _smaller(result: Result) -> str:
    """What smaller shapes give, and who runs them."""
    gain = "The tensors themselves are smaller: files, memory and time shrink with them, on every machine."
    if result["shapes"].get("blocks"):
        return f"{gain} Blocks that stay are as they were, so transformers, vLLM and llama.cpp load the result."
    if result["shapes"].get("split") or "ranks" in result["shapes"].get("kinds", ()):
        split = f"{gain} Matrices become products of two, which stock classes have no place for:"
        if result.get("loads") == "prunus":
            return f"{split} prunus loads the result."
        return (
            f"{split} a small modelling file "
            "lies in the folder, prunus loads it as it is, transformers with trust_remote_code=True. `prunus export "
            "--portable` multiplies them back, to a stock class of the dense model's size; llama.cpp takes that alone."
        )
    if result.get("loads") == "transformers":
        return f"{gain} All blocks have one shape, so stock transformers loads the result."
    if result.get("loads") == "code":
        return (
            f"{gain} Blocks differ from each other, so a small modelling file lies in the folder: prunus loads it as "
            "it is, transformers with trust_remote_code=True. `prunus export --portable` writes a stock class instead, "
            "`--format gguf` a file for llama.cpp."
        )
    if result.get("loads") == "prunus":
        return (
            f"{gain} Blocks differ from each other (or have biases), which stock classes have no place for: prunus "
            "loads the result, and `prunus export` writes what other tools load."
        )
    return f"{gain} Where all blocks get one shape, stock transformers loads the result; else prunus does."


def _same_everywhere(result: Result) -> bool:
    """True if every block has the sparsity that the N:M pattern names; a plan may not know yet, and then it has not."""
    kept, group = map(int, result["pattern"].split(":"))
    found = [block.get("wanted", block["sparsity"]) for block in result["blocks"] if block.get("parameters", 1)]
    return all(sparsity is not None and abs(sparsity - (1 - kept / group)) < 1e-4 for sparsity in found)


def calibration_line(calibration: Result | None) -> str:
    """`128 x 512 tokens of wikitext2, seed 0, BOS at the head of each`; empty if nothing looked at them."""
    if not calibration or not calibration.get("used", True):
        return ""
    tokens = f"{calibration['samples']} x {calibration['length']} tokens of {calibration['source']}"
    return f"{tokens}, seed {calibration['seed']}{_bos(calibration.get('bos'))}"


def method_line(result: Result) -> str:
    """The method with what replaces its parts."""
    parts = [f"{axis} {result[axis]}" for axis in ("metric", "update") if result.get(axis)]
    return ", ".join([result["method"], *parts, f"pattern {result['pattern']}", f"allocation {result['allocation']}"])


def _bos(bos: Any) -> str:
    return {True: ", BOS at the head of each", False: ", no BOS"}.get(bos, "")


def _spread(blocks: Sequence[Result]) -> str:
    """The sparsest, the densest and the worst block, in one line."""
    sparsities = [block["sparsity"] for block in blocks]
    low, high = min(sparsities, default=0.0), max(sparsities, default=0.0)
    text = f"{percent(low)} each" if high - low < 1e-4 else f"{percent(low)} to {percent(high)}"
    errors = [(block["error"], block["name"]) for block in blocks if block.get("error") is not None]
    if errors:
        error, name = max(errors)
        text += f"; output error at most {error:.4f} of the dense output (squared), in {name}"
    return text


def _took(seconds: Result) -> str:
    parts = [f"{name} {clock(value)}" for name, value in seconds.items() if name != "total" and value >= 0.5]
    return clock(seconds["total"]) + (f" ({', '.join(parts)})" if parts else "")


def _memory(result: Result) -> str:
    predicted = result.get("predicted_peak_bytes")
    return f"{bytes_text(result['peak_rss_bytes'])} at the peak" + (
        f", {bytes_text(predicted)} predicted" if predicted else ""
    )


def _parameters(result: Result) -> str:
    """Before and after, and what share of the blocks was asked for if another went."""
    shapes, sparsity = result["shapes"], result["sparsity"]
    text = f"{shapes['parameters']:,} of {result['parameters']['model']:,} are left"
    if abs(sparsity["wanted"] - sparsity["reached"]) > 5e-4:
        unit = "whole ranks" if shapes.get("split") else "whole groups or blocks"
        text += f"; asked for {percent(sparsity['wanted'])} of the blocks, {unit} gave the nearest"
    return text


def _speedup(found: Result | None) -> str:
    """What was asked, what the stand-ins said to that, and what the result does."""
    if not found:
        return ""
    trials = ", ".join(f"{percent(trial['share'])} gone: {trial['factor']:.2f} x" for trial in found["trials"])
    share = percent(found["chosen"]["share"])
    axes = ", ".join(f"{kept:,} of {whole:,} {kind}" for kind, (kept, whole) in found["chosen"]["axes"].items())
    reached, rows = found["reached"], found["tokens_per_second"]
    before, after = rows["dense"]["decode"], rows["result"]["decode"]
    return (
        f"asked for {found['wanted']:g} x; stand-ins ({trials}) said {share}, which leaves {axes}. The "
        f"result decodes {reached['decode']:.2f} x as fast ({before:.1f} -> {after:.1f} tokens/s) and reads "
        f"prompts {reached['prefill']:.2f} x as fast, in transformers, float32, on {found['threads']} "
        f"thread{'s' * (found['threads'] > 1)}"
    )


def _checked(verify: Result | None, loads: str = "transformers") -> str:
    if not verify:
        return ""
    difference = verify.get("relative_difference", verify["max_difference"])
    equal = f"differ from the run's by {difference:.1g} of the largest (allowed: {verify['tolerance']:.0g})"
    how = LOADERS[loads]
    return f"loaded by {how} in a fresh process; its logits {equal if difference else 'are those of the run'}"


def _size(size: Result) -> str:
    if not size:
        return ""
    return f"{bytes_text(size['out_bytes'])} of weights, dense {bytes_text(size['dense_bytes'])}"


def _budget_line(result: Result) -> str:
    if result["budget"] == "per block":
        return "per block, see below"
    if result["budget"] == "uniform":
        return f"{percent(max(block['sparsity'] for block in result['blocks']))} in every block"
    return result["budget"]


def _left_alone(left: Result) -> str:
    parts = [f"{left['outside']:,} parameters outside the blocks (embeddings, head, last norm)"]
    parts.append(f"{left['inside']:,} inside them (norms, biases and what is no matrix)")
    if left["ignored"]:
        parts.append(f"{len(left['ignored'])} ignored matrices")
    if left["uncovered"]:
        names = ", ".join(f"{name} ({size:,})" for name, size in left["uncovered"][:3])
        more = f" and {len(left['uncovered']) - 3} more" if len(left["uncovered"]) > 3 else ""
        parts.append(f"large parameters that no method covers: {names}{more}")
    return "; ".join(parts)


def _terms(memory: Result) -> str:
    if not memory.get("total"):
        return "unknown"
    terms = [f"{name.replace('_', ' ')} {bytes_text(value)}" for name, value in memory["terms"].items() if value]
    return f"{bytes_text(memory['total'])} = {' + '.join(terms)}"


def _time_line(time: Result) -> str:
    return time["basis"] if time["seconds"] is None else f"about {clock(time['seconds'])} ({time['basis']})"


def _provenance(record: Result | None) -> str:
    if not record:
        return "unknown: there is no prunus.json"
    recipe, versions = _inside(record, "recipe"), _inside(_inside(record, "result"), "versions")
    recover, before = _inside(recipe, "recover"), _inside(record, "pruned")
    if recover and "pruned" in record:
        # The recipe's `prune` is not what was done: the folder that was recovered says what was.
        how = ", ".join(str(recover[key]) for key in ("method", "objective") if recover.get(key))
        first = _provenance(before) if before else "a folder that says nothing of its making"
        return f"prunus {versions.get('prunus', '')}, recovered ({how}) from {recipe.get('model', '?')}; that: {first}"
    prune = _inside(recipe, "prune")
    what = ", ".join(str(prune[key]) for key in ("method", "pattern", "allocation") if prune.get(key))
    return f"prunus {versions.get('prunus', '')} from {recipe.get('model', '?')}" + (f": {what}" if what else "")


def _inside(record: Result, key: str) -> Result:
    """The mapping under a key of a file that anybody may have written; empty if there is none."""
    found = record.get(key)
    return found if isinstance(found, Mapping) else {}


def _oddities(result: Result) -> str:
    counts = (
        ("negative_zeros", "zeros written as -0.0"),
        ("nan", "values that are NaN"),
        ("infinite", "infinite values"),
    )
    parts = [f"{result[key]:,} {text}" for key, text in counts if result[key]]
    if result["other_dtypes"]:
        parts.append(f"tensors of type {', '.join(result['other_dtypes'])} were not counted")
    return "; ".join(parts)


def _warnings(warnings: Iterable[str] | None, word: str = "Warning") -> list[str]:
    return [wrap(f"{word}: {warning}") for warning in warnings or ()]
