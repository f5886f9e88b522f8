"""A GGUF file proven: read back tensor by tensor, and run by llama.cpp beside transformers where it is installed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from prunus.errors import FormatError
from prunus.formats.gguf_layout import Layout

# Largest allowed difference of a logit, relative to the largest one, by the type of the file. llama.cpp computes f16,
# bf16 and q8_0 matrices with activations rounded to 16 or 8 bits. Measured on trained models: 1e-5, 1e-3, 8e-3, 2e-2.
TOLERANCE = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}
PROMPTS = ("Once upon a time, there was", "The capital of the country is", "In the morning the children")
GREEDY = 16


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
        FormatError: a tensor is missing or differs, or llama.cpp computes something else.
    """
    _read_back(file, layout, kind)
    if find_spec("llama_cpp") is None:
        note = "llama.cpp was not run: pip install llama-cpp-python, and export again to compare logits and tokens."
        line = f"{len(layout.tensors)} tensors read back"
        return {"line": line, "notes": [note], "ran": False}
    tensors = load_file(probe)
    difference = compare_logits(file, tensors["input.input_ids"], tensors["logits"])
    if not difference <= TOLERANCE[kind]:
        raise FormatError(
            f"llama.cpp computes other logits from the file than transformers from {source} (relative difference "
            f"{difference:.2g}, allowed for {kind} {TOLERANCE[kind]:.0e}). Nothing was written; please report it."
        )
    greedy = compare_greedy(file, source)
    words = f"{greedy['equal']} of {greedy['tokens']} greedy tokens equal"
    if greedy["ties"]:
        words += f", {greedy['ties']} more at near-ties"
    line = f"run by llama.cpp: largest difference of a logit {difference:.1g} of the largest, {words}"
    return {"line": line, "notes": greedy.pop("notes"), "ran": True, "relative_difference": difference, **greedy}


def compare_logits(file: Path, tokens: Tensor, logits: Tensor) -> float:
    """Largest difference between llama.cpp's logits and those given, relative to the largest of them.

    Args:
        file: the GGUF file.
        tokens: int `[1, length]`.
        logits: `[1, length, vocabulary]`.
    """
    with_cpp = run(file, tokens[0].tolist())
    expected = logits[0].float()
    return float((with_cpp - expected).abs().max() / expected.abs().max())


def run(file: Path, tokens: list[int]) -> Tensor:
    """llama.cpp's logits `[length, vocabulary]` of a file, with a cache in float32."""
    model = _open(file)
    try:
        model.eval(tokens)
        return torch.from_numpy(numpy.array(model.scores[: len(tokens)]))
    finally:
        model.close()


@torch.no_grad()
def compare_greedy(file: Path, source: Path) -> dict[str, Any]:
    """Continue `PROMPTS` with both programs, `GREEDY` tokens each.

    Where they part, the two tokens' logits in transformers are compared: within the tolerance of the types it is a
    near-tie, and the rest of that prompt is not counted.

    Returns:
        `{"tokens": compared, "equal": of them, "ties": …, "notes": […]}`.

    Raises:
        FormatError: they part where there is no tie.
    """
    from prunus.data.tokens import load_tokenizer
    from prunus.loading import load

    reference, tokenizer = load(source, dtype="float32"), load_tokenizer(source)
    model = _open(file)
    counts = {"tokens": 0, "equal": 0, "ties": 0}
    notes: list[str] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        theirs = model.tokenize(prompt.encode(), add_bos=True, special=False)
        if theirs != ids:
            raise FormatError(f"llama.cpp cuts {prompt!r} into other tokens ({theirs}) than transformers ({ids}).")
        for wanted, got, gap in _continue(reference, model, ids):
            counts["tokens"] += 1
            counts["equal"] += wanted == got
            if wanted != got:
                if gap > 0.05:
                    raise FormatError(f"llama.cpp continues {prompt!r} with token {got}, transformers with {wanted}.")
                counts["ties"] += 1
                break
    model.close()
    return {**counts, "notes": notes}


def _continue(reference: Any, model: Any, ids: list[int]) -> Iterable[tuple[int, int, float]]:
    """Token of transformers, token of llama.cpp, and how much of the largest logit lies between them, step by step."""
    ids = list(ids)
    for _ in range(GREEDY):
        logits = reference(input_ids=torch.tensor([ids])).logits[0, -1].float()
        model.reset()
        model.eval(ids)
        got = int(numpy.argmax(model.scores[len(ids) - 1]))
        wanted = int(logits.argmax())
        yield wanted, got, float((logits[wanted] - logits[got]) / logits.abs().max())
        ids.append(wanted)


def _open(file: Path) -> Any:
    import llama_cpp

    llama_cpp.llama_log_set(_silence(), None)
    try:
        # 0 is float32: the cache would otherwise be float16 and hide small differences.
        return llama_cpp.Llama(str(file), n_ctx=256, n_batch=256, logits_all=True, verbose=False, type_k=0, type_v=0)
    except (ValueError, OSError) as problem:
        raise FormatError(f"llama.cpp cannot load the file: {problem}. Nothing was written.") from problem


@cache
def _silence() -> Any:
    """Takes llama.cpp's log lines; kept, for the library holds no reference to it."""
    from llama_cpp import llama_log_callback

    return llama_log_callback(lambda level, text, data: None)


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
