"""The README.md of a recovered checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

BODY = """
# {title}

{what}, by prunus {version}.

| | |
|---|---|
| recovery | `{method}`, objective `{objective}` |
| trained | {trainable:,} values, {share:.4f} % of the model |
| held-out loss | {before:.4f} before, {after:.4f} after{beside} |
| zeros | {zeros} |
| learnt from | `{source}`, {rows:,} sequences of {length} tokens |

{notes}

```python
{code}
```
"""

KEPT = (
    "`prunus.masks` beside the weights says which weights are kept; further training by prunus keeps them so. The "
    "zeros are stored like any other number."
)
RECORD = "`prunus.json` has the recipe of the recovery and, under `pruned`, that of the pruning."
STOCK = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}"{trust}){pruned}
tokenizer = AutoTokenizer.from_pretrained("{title}"{trust})"""
# No class of transformers has a place for its shapes.
OWN = """import prunus

model = prunus.load("{title}"){pruned}"""
ADAPTED = """from peft import PeftModel
{load}
model = PeftModel.from_pretrained(model, "{title}/adapter")  # recovered"""
TRUST = ", trust_remote_code=True"  # modeling_pruned.py, read it first
APART = (
    "The weights are those of the pruned model. What was trained is the LoRA adapter in `adapter`, in peft's form: "
    "merged in the usual way it would fill the zeros. `prunus merge` merges it under the masks."
)


def recovery_card(result: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The model card as Markdown with a YAML head; of local paths only the last part is shown.

    Args:
        result: what `run.recover` returns.
        record: `prunus.json` of the pruned model.
    """
    text, loss = result["text"], result["loss"]
    head = {"library_name": "transformers", "tags": ["prunus", "pruned", "sparse", "recovered", str(result["method"])]}
    title, zeros, apart = _last(result["out"]), result["zeros"]["after"], result["training"].get("apart")
    what = "retrained so that every pruned weight is still zero" if zeros else "retrained"
    if apart:
        what = "with an adapter that was trained beside it, so that every pruned weight is still zero"
    notes = [*([APART] if apart else []), *([KEPT] if zeros else []), RECORD]
    body = BODY.format(
        what=f"A pruned language model, {what}" if zeros or record else "A language model, retrained",
        notes=" ".join(notes), beside=" (with the adapter)" if apart else "",
        code=_loading(title, result.get("loads", "transformers"), bool(apart)), title=title,
        version=result["versions"]["prunus"], method=result["method"], objective=result["objective"],
        trainable=result["trainable"], share=100 * result["trainable_share"],
        before=loss["before"], after=loss["after"], source=_last(text["source"]),
        zeros=f"{zeros:,}, none lost" if zeros else "none were there", rows=text["rows"], length=text["length"],
    )  # fmt: skip
    pruned = record.get("result")
    if isinstance(pruned, Mapping) and pruned.get("method"):
        body += f"\nPruned by `{pruned['method']}`" + (f", {pruned['pattern']}.\n" if pruned.get("pattern") else ".\n")
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{body}"


def _loading(title: str, loads: str, apart: bool) -> str:
    """Python that loads the result: `loads` says whether transformers can, by itself or with the file beside it."""
    trust, pruned = TRUST if loads == "code" else "", "  # as it was pruned" if apart else ""
    load = (OWN if loads == "prunus" else STOCK).format(title=title, trust=trust, pruned=pruned)
    return ADAPTED.format(title=title, load=load) if apart else load


def _last(path: Any) -> str:
    """The last part of a path, on one line and without what could leave a code span or a string."""
    return "".join(letter for letter in str(path).rstrip("/").rpartition("/")[2] if letter not in '`"\\\n')
