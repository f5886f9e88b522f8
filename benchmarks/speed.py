"""Decode and prefill speed of every packed variant beside its baselines; the numbers of docs/faster.md.

    python benchmarks/speed.py --folder SCRATCH [--model smollm2 | --shape 1.1b] [--only int8-capped]

Weights are removed by magnitude, 70 % of every row: this is about speed alone. Every variant is one run of
`prunus bench`, in which the engines take turns. `--shape 1.1b` makes a Llama of that size with random weights. Writes
`benchmarks/results/speed.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import prunus
from prunus.bench.run import Setup, bench
from prunus.models.checkpoint import Checkpoint
from prunus.models.source import locate
from prunus.packed.layout import layout
from prunus.patterns import NM, Capped, Pattern, Unstructured
from prunus.runtime.native import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results" / "speed.json"
ALL = ("hf-fp32", "hf-bf16", "dense-bf16", "dense-int8", "llama.cpp")
# Name -> values, pattern, sparsity, baselines.
VARIANTS: dict[str, tuple[str, Pattern, float, tuple[str, ...]]] = {
    "lossless-unstructured": ("bf16", Unstructured(), 0.7, ("hf-fp32", "hf-bf16", "dense-bf16")),
    "int8-unstructured": ("int8", Unstructured(), 0.7, ALL),
    "int8-capped": ("int8", Capped(6, 16), 0.7, ("dense-int8", "llama.cpp")),
    "int4-capped": ("int4", Capped(6, 16), 0.7, ("dense-int8", "llama.cpp")),
    "int8-4:16": ("int8", NM(4, 16), 0.75, ("dense-int8",)),
}
SHAPES = {
    "1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
}  # fmt: skip


def random_model(shape: str, folder: Path) -> Path:
    """A Llama of this shape in bfloat16 with random weights, and a vocabulary of its size, without which no GGUF is."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if not folder.exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        vocabulary(SHAPES[shape]["vocab_size"]).save_pretrained(folder)
    return folder


def vocabulary(size: int) -> PreTrainedTokenizerFast:
    """All bytes and so many pairs of them that there are `size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.islice(itertools.product(letters, letters), size - len(letters)))
    words = [*letters, *map("".join, pairs)]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, pairs))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=words[1], eos_token=words[2])


def thinned(source: Path, out: Path, pattern: Pattern, sparsity: float) -> Path:
    """The model with the smallest weights of its blocks removed, in bfloat16, one shard for each of its own."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    checkpoint = Checkpoint.open(source)
    inside = layout(source, checkpoint).matrices
    for file in sorted({stored.file for stored in checkpoint.tensors.values()}):
        names = [name for name, stored in checkpoint.tensors.items() if stored.file == file]
        tensors = {}
        for name, weight in checkpoint.read(names):
            kept = weight * pattern.keep(weight.float().abs(), sparsity) if name in inside else weight
            tensors[name] = kept.bfloat16()
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--only", choices=sorted(VARIANTS))
    given = parser.parse_args()
    name = given.shape or given.model
    source = random_model(given.shape, given.folder / given.shape) if given.shape else locate(given.model)
    record: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for variant in [given.only] if given.only else list(VARIANTS):
        values, pattern, sparsity, against = VARIANTS[variant]
        thin = thinned(source, given.folder / "thin", pattern, sparsity)
        found = bench(thin, against=against, values=values, setup=Setup(threads=require().threads))
        found |= {"model": name, "variant": variant, "sparsity": sparsity, "processor": platform.processor()}
        found |= {"prunus": prunus.__version__}
        record.setdefault(name, {})[variant] = found
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        for row in found["rows"]:
            print(f"{name} {variant} {row['engine']} {row['phase']}: {row['tokens_per_second']:.1f}", flush=True)
        shutil.rmtree(thin)


if __name__ == "__main__":
    main()
