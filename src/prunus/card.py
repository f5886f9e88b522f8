"""The README.md of a pruned checkpoint: what it is, how it was made, what it costs, how to load it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prunus.report import causal

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

SHAPED = """
The tensors themselves are smaller: files, memory and time shrink with them. {loads}
"""

STOCK = "All blocks have shapes that stock transformers builds."
OWN = "Blocks have shapes of their own, which stock classes have no place for; prunus loads them."
CODE = "Blocks have shapes of their own, built by the short file modeling_pruned.py beside the weights; read it first."

ZEROS = """
The zeros are stored like any other number: the files are as large as the dense model's, and stock runtimes compute
as long. The checkpoint is for study, for recovery training, and for runtimes that make use of zeros.
"""
KEEPS = " Further training does not keep the zeros by itself."

BODY = """
# {title}

{model} with {reached} of the weights of its transformer blocks {done} ({share} of all parameters), made by
prunus {version}.
{gain}
## Load it

```python
{loading}
```

{needs}

## How it was made

{table}

Sparsity by block: {spread}. `prunus.json` beside this file has the recipe with every default, the sparsity of every
matrix, the hash of the calibration tokens and the versions of all libraries.

## Make it again

```shell
{command}
```
"""


def model_card(result: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> str:
    """The model card as Markdown with a YAML head.

    Local paths are cut to their last part: a card is published, and the maker's folders are nobody's business.

    Args:
        result: what `prunus.engine.prune` returns.
        recipe: the resolved recipe, for settings that the result does not repeat.
    """
    sparsity, shaped = result["sparsity"], bool(result.get("shapes"))
    loads = result.get("loads", "transformers")
    stock = loads == "transformers"
    name = _public(result["model"])
    base = (
        {"base_model": result["model"]}
        if HUB_ID.fullmatch(str(result["model"])) and not Path(result["model"]).exists()
        else {}
    )
    tags = ["prunus", "pruned", *([] if shaped else ["sparse"]), str(result["method"])]
    head = {"library_name": "transformers", **base, "tags": tags}
    body = BODY.format(
        title=_plain(f"{name}, {100 * sparsity['reached']:.0f} % pruned"),
        model=_code(name),
        done="removed" if shaped else "set to zero",
        gain=SHAPED.format(loads={"transformers": STOCK, "code": CODE}.get(loads, OWN)) if shaped else ZEROS,
        needs="" if not stock else "It needs nothing but transformers." + ("" if shaped else KEEPS),
        reached=f"{100 * sparsity['reached']:.2f} %",
        share=f"{100 * sparsity['model']:.2f} %",
        version=result.get("versions", {}).get("prunus", ""),
        loading=_loading(result),
        table=_table(_facts(result)),
        spread=_spread(result["blocks"]),
        command=_command(result, recipe or {}),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{body}"


def _loading(result: Mapping[str, Any]) -> str:
    """Python that loads the checkpoint; a model without a language head by its own class."""
    name, folder = str(result.get("architecture")), _public(result["out"])
    if result.get("loads") == "prunus":
        return f"import prunus\n\nmodel = prunus.load({folder!r})"
    if not causal(result) and result.get("loads") != "code":  # the stock class would fill what it lacks at random
        return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({folder!r})"
    trust = ", trust_remote_code=True" if result.get("loads") == "code" else ""  # modeling_pruned.py, read it first
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r}{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r}{trust})"
    )


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    calibration = result.get("calibration") or {}
    facts = {
        "method": result["method"],
        "metric": result.get("metric"),
        "update": result.get("update"),
        "pattern": result["pattern"],
        "allocation": result["allocation"],
        "sparsity asked for": result["sparsity"]["wanted"],
    }
    if calibration and calibration.get("used", True):
        facts["calibration"] = (
            f"{calibration['samples']} x {calibration['length']} tokens of {_public(calibration['source'])}"
        )
        facts["calibration seed"] = calibration["seed"]
        facts["calibration tokens, sha256"] = calibration["sha256"]
    facts |= {
        library: version
        for library, version in result.get("versions", {}).items()
        if library in ("torch", "transformers")
    }
    return {key: str(value) for key, value in facts.items() if value is not None}


def _spread(blocks: list[Mapping[str, Any]]) -> str:
    sparsities = [block["sparsity"] for block in blocks]
    low, high = 100 * min(sparsities, default=0.0), 100 * max(sparsities, default=0.0)
    return f"{low:.2f} %" if high - low < 0.01 else f"{low:.2f} to {high:.2f} %"


def _command(result: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The command line that repeats the run, options that have their default left out."""
    prune = recipe.get("prune") or {}
    words = ["prunus", "prune", _public(result["model"]), _public(result["out"]), "--method", str(result["method"])]
    if ":" in str(result["pattern"]):
        words += ["--pattern", result["pattern"]]
    else:
        words += ["--sparsity", f"{result['sparsity']['wanted']:g}"]
    words += ["--allocation", result["allocation"]] if result["allocation"] != "uniform" else []
    for option in ("metric", "update"):
        words += [f"--{option}", result[option]] if result.get(option) else []
    words += [word for key, value in (prune.get("settings") or {}).items() for word in ("--set", f"{key}={value}")]
    words += [word for glob in prune.get("ignore") or () for word in ("--ignore", glob)]
    words += ["--blocks", prune["blocks"]] if prune.get("blocks") else []
    words += ["--compat", prune["compat"]] if prune.get("compat", "exact") != "exact" else []
    calibration = result.get("calibration") or {}
    if calibration and calibration.get("used", True):
        words += ["--calibration", _public(calibration["source"])]
        words += [word for key in ("samples", "length", "seed") for word in (f"--{key}", str(calibration[key]))]
        bos = (recipe.get("calibration") or {}).get("bos", "auto")
        words += ["--bos", bos] if bos != "auto" else []
    for option, default in (("device", "cpu"), ("dtype", "auto")):
        value = recipe.get(option, default)
        words += [f"--{option}", value] if value != default else []
    words += ["--trust-remote-code"] if recipe.get("trust_remote_code") else []
    return " ".join(shlex.quote(" ".join(str(word).split())) for word in words)


def _public(name: Any) -> str:
    """A hub id or an alias as it is, of a local path only the last part."""
    text = str(name)
    return text if HUB_ID.fullmatch(text) and not Path(text).exists() else Path(text).name or text


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_code(value)} |" for key, value in facts.items())])


def _plain(text: str) -> str:
    """One line in which Markdown and HTML mean nothing."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A code span that the text cannot leave; a bar would end a table's cell."""
    line = " ".join(text.split()).replace("|", "¦")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    return f"{fence}{line}{fence}" if fence == "`" else f"{fence} {line} {fence}"
