"""A GGUF file proven: read back tensor by tensor, and run by llama.cpp beside transformers where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prunus.errors import FormatError
from prunus.formats.gguf_layout import Layout
from prunus.formats.llama_run import run_llama

# Largest allowed difference of a logit, relative to the largest one, by the type of the file. llama.cpp computes f16,
# bf16 and q8_0 matrices with activations rounded to 16 or 8 bits. Measured: f32 8e-7 at most, bf16 5e-3 and q8_0 2e-2
# on a model of 260 thousand parameters; f16 1.6e-2 (70 % of the weights gone) and q8_0 4e-2 on SmolLM2-135M.
TOLERANCE = {"f32": 1e-3, "f16": 5e-2, "bf16": 5e-2, "q8_0": 1e-1}
PROMPTS = ("Once upon a time, there was", "The capital of the country is", "In the morning the children")
GREEDY = 16
TIE = 0.05


class OtherLogits(FormatError):
    """A file holds what it should, and llama.cpp computes something else from it.

    Attributes:
        what: how much else, as a sentence without its full stop.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. Nothing was written; please report it.")
        self.what = what


def check(file: Path, layout: Layout, source: Path, probe: Path, kind: str) -> dict[str, Any]:
    """Compare a file with the model that it was made of.

    Args:
        file: the GGUF file.
        layout: what it should hold.
        source: the model as a folder that loads.
        probe: tokens and the source's logits, from `check.probe`.
        kind: type of the file.

    Returns:
        `line` for the report, `notes`, and the numbers.

    Raises:
        FormatError: a tensor is missing or differs.
        OtherLogits: llama.cpp computes something else.
    """
    _read_back(file, layout, kind)
    if find_spec("llama_cpp") is None:
        note = "llama.cpp was not run: pip install llama-cpp-python, and export again to compare logits and tokens."
        line = f"{len(layout.tensors)} tensors read back"
        return {"line": line, "notes": [note], "ran": False}
    tensors = load_file(probe)
    rows, expected = _greedy(source)
    texts, logits = run_llama(file, list(PROMPTS), [tensors["input.input_ids"][0].tolist(), *rows])
    difference = _difference(logits[0], tensors["logits"][0])
    if not difference <= TOLERANCE[kind]:
        raise OtherLogits(
            f"llama.cpp computes other logits from the {kind} file than transformers from the model (relative "
            f"difference {difference:.2g}, allowed {TOLERANCE[kind]:.0e})"
        )
    counts = compare_greedy(rows, expected, texts, logits[1:])
    words = f"{counts['equal']} of {counts['tokens']} greedy tokens equal"
    if counts["ties"]:
        words += f", {counts['ties']} more at near-ties"
    line = f"run by llama.cpp: largest difference of a logit {difference:.1g} of the largest, {words}"
    return {"line": line, "notes": [], "ran": True, "relative_difference": difference, **counts}


def compare_greedy(
    rows: list[list[int]], expected: list[Tensor], texts: list[list[int]], logits: list[Tensor]
) -> dict[str, int]:
    """How far llama.cpp chooses the tokens that transformers chose.

    Where they part, the two tokens' logits in transformers are compared: closer than `TIE` of the largest logit they
    are a near-tie, and the rest of that prompt is not counted.

    Args:
        rows: prompts with the `GREEDY` tokens that transformers put behind them.
        expected: transformers' logits `[GREEDY, vocabulary]` of those tokens.
        texts: llama.cpp's tokens of the prompts.
        logits: llama.cpp's logits `[length, vocabulary]` of the rows.

    Raises:
        FormatError: the prompts are cut otherwise, or the programs part where there is no tie.
    """
    counts = {"tokens": 0, "equal": 0, "ties": 0}
    for prompt, row, theirs, mine, others in zip(PROMPTS, rows, texts, expected, logits, strict=True):
        start = len(row) - GREEDY
        if theirs != row[:start]:
            raise FormatError(
                f"llama.cpp cuts {prompt!r} into other tokens ({theirs}) than transformers ({row[:start]})."
            )
        for step in range(GREEDY):
            wanted, got = row[start + step], int(others[start + step - 1].argmax())
            counts["tokens"] += 1
            counts["equal"] += wanted == got
            if wanted != got:
                gap = float((mine[step, wanted] - mine[step, got]) / mine[step].abs().max())
                if gap > TIE:
                    raise OtherLogits(f"llama.cpp continues {prompt!r} with token {got}, transformers with {wanted}")
                counts["ties"] += 1
                break
    return counts


@torch.no_grad()
def _greedy(source: Path) -> tuple[list[list[int]], list[Tensor]]:
    """Prompts continued by transformers, and the logits that decided."""
    from prunus.data.tokens import load_tokenizer
    from prunus.loading import load

    model, tokenizer = load(source, dtype="float32"), load_tokenizer(source)
    rows, logits = [], []
    for prompt in PROMPTS:
        row, chosen = tokenizer(prompt)["input_ids"], []
        for _ in range(GREEDY):
            last = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].float()
            chosen.append(last)
            row = [*row, int(last.argmax())]
        rows.append(row)
        logits.append(torch.stack(chosen))
    return rows, logits


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected.float()).abs().max() / expected.abs().max())


def _read_back(file: Path, layout: Layout, kind: str) -> None:
    """See that every tensor lies in the file as planned."""
    from gguf import GGUFReader

    from prunus.formats.gguf import encoded, stored_type

    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    lost = {entry.name for entry in layout.tensors} ^ set(found)
    if lost:
        raise FormatError(f"The file lacks or has beyond the plan: {', '.join(sorted(lost)[:3])}. Nothing was written.")
    for entry in layout.tensors:
        expected = encoded(entry.read(), stored_type(entry.name, entry.shape, kind))
        tensor = found[entry.name]
        same = list(reversed(tensor.shape.tolist())) == list(entry.shape)
        if not same or tensor.data.tobytes() != expected.tobytes():
            raise FormatError(f"{entry.name} reads back other numbers than were written. Nothing was written.")
