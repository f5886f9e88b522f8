"""The tokenizer in a GGUF file: the two kinds of byte-pair vocabularies that llama.cpp cuts text with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from prunus.data.tokens import load_tokenizer
from prunus.errors import FormatError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before pairs of bytes are joined -> llama.cpp's name for it.
CUTS = {
    ("bytes", GPT2_WORDS): "gpt-2",
    ("digits", "bytes", GPT2_WORDS): "smollm",
    (CASES + r"\p{N}{1,3}" + REST, "bytes"): "llama-bpe",
    (CASES + r"\p{N}" + REST, "bytes"): "qwen2",
}


def vocabulary(folder: Path, config: PreTrainedConfig) -> Callable[[Any], None]:
    """A function that adds the tokenizer of a folder to a `gguf.GGUFWriter`.

    Raises:
        FormatError: there is no tokenizer.json, or llama.cpp would cut text in another way.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FormatError(f"{folder} has no tokenizer.json, from which a GGUF file's vocabulary is made; add it.")
    whole = json.loads(path.read_text(encoding="utf-8"))
    model = whole["model"]
    if model.get("type") != "BPE":
        raise FormatError(f"Its tokenizer is of the kind {model.get('type')!r}; only byte pairs (BPE) can be written.")
    tokens, types = _tokens(whole, config.vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    kind = "llama" if model.get("byte_fallback") else "gpt2"
    cut = None if kind == "llama" else _cut(whole.get("pre_tokenizer"))
    tokenizer = load_tokenizer(folder)
    ids = _special(tokenizer, config)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    prefix = "Prepend" in json.dumps(whole.get("normalizer"))
    template = tokenizer.chat_template

    def add(writer: Any) -> None:
        writer.add_tokenizer_model(kind)
        if cut is None:
            writer.add_token_scores(_scores(tokens, merges))
            writer.add_add_space_prefix(prefix)
            writer.add_tokenizer_pre("default")
        else:
            writer.add_tokenizer_pre(cut)
            writer.add_token_merges(merges)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_add_bos_token(begins)
        writer.add_add_eos_token(False)
        for name, number in ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        if isinstance(template, str):
            writer.add_chat_template(template)

    return add


def _tokens(whole: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """All tokens in order, and what each of them is."""
    words = {number: word for word, number in whole["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in whole.get("added_tokens", ())}
    words |= {number: entry["content"] for number, entry in added.items()}
    unknown = whole["model"].get("unk_token")
    tokens, types = [], []
    for number in range(size):
        word = words.get(number, f"[PAD{number}]")
        kind = NORMAL if number in words else UNUSED
        if word == unknown:
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number]["special"] else USER
        elif whole["model"].get("byte_fallback") and len(word) == 6 and word.startswith("<0x"):
            kind = BYTE
        tokens.append(word)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores by which llama.cpp joins pairs in the order of the merges; what no merge gives is joined last."""
    order: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        order.setdefault(pair.replace(" ", ""), rank)
    return [-float(order.get(token, 1_000_000)) for token in tokens]


def _cut(part: Any) -> str:
    """llama.cpp's name for the way in which the tokenizer cuts text into words.

    Raises:
        FormatError: it is none of those that are known here.
    """
    steps = tuple(_steps(part))
    if steps not in CUTS:
        known = ", ".join(CUTS.values())
        raise FormatError(
            f"The tokenizer cuts text in a way that has no name here (known: {known}), so llama.cpp would cut it in "
            "another and see other tokens. Convert a stock folder with llama.cpp's own converter instead: "
            "prunus export MODEL OUT --format hf --portable."
        )
    return CUTS[steps]


def _steps(part: Any) -> list[str]:
    """The pieces of a pre-tokenizer in tokenizer.json that decide where it cuts."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part["pretokenizers"] for step in _steps(inner)]
    if part["type"] == "ByteLevel":
        return ["bytes", *([GPT2_WORDS] if part.get("use_regex", True) else [])]
    if part["type"] == "Digits":
        return ["digits"] if part.get("individual_digits") else ["numbers"]
    if part["type"] == "Split":
        return [part["pattern"].get("Regex", str(part["pattern"]))]
    return [part["type"]]


def _special(tokenizer: Any, config: PreTrainedConfig) -> dict[str, int]:
    end = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    ids = {
        "bos": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id,
        "eos": end[0] if isinstance(end, list) else end,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: number for name, number in ids.items() if number is not None}
