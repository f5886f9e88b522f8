"""The README.md of a recovered checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

BODY = """
# {title}

A pruned language model, retrained so that every pruned weight is still zero, by prunus {version}.

| | |
|---|---|
| recovery | `{method}`, objective `{objective}` |
| trained | {trainable:,} values, {share:.4f} % of the model |
| held-out loss | {before:.4f} before, {after:.4f} after |
| zeros | {zeros:,}, none lost |
| learnt from | `{source}`, {rows:,} sequences of {length} tokens |

`prunus.masks` beside the weights says which weights are kept; further training by prunus keeps them so. `prunus.json`
has the recipe of the recovery and, under `pruned`, that of the pruning. The zeros are stored like any other number.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```
"""


def recovery_card(result: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The model card as Markdown with a YAML head; of local paths only the last part is shown.

    Args:
        result: what `run.recover` returns.
        record: `prunus.json` of the pruned model.
    """
    text, loss = result["text"], result["loss"]
    head = {"library_name": "transformers", "tags": ["prunus", "pruned", "sparse", "recovered", str(result["method"])]}
    body = BODY.format(
        title=_last(result["out"]), version=result["versions"]["prunus"], method=result["method"],
        objective=result["objective"], trainable=result["trainable"], share=100 * result["trainable_share"],
        before=loss["before"], after=loss["after"], zeros=result["zeros"]["after"], source=_last(text["source"]),
        rows=text["rows"], length=text["length"],
    )  # fmt: skip
    pruned = record.get("result")
    if isinstance(pruned, Mapping) and pruned.get("method"):
        body += f"\nPruned by `{pruned['method']}`" + (f", {pruned['pattern']}.\n" if pruned.get("pattern") else ".\n")
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{body}"


def _last(path: Any) -> str:
    """The last part of a path, on one line and without what could leave a code span or a string."""
    return "".join(letter for letter in str(path).rstrip("/").rpartition("/")[2] if letter not in '`"\\\n')
