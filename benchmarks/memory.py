"""Peak memory of pruning a random 1.1 B Llama shape, and how it grows with depth.

    python benchmarks/memory.py --folder /tmp/prunus-memory [--blocks 22 44] [--dtype bfloat16 float32]

Writes models of 22 and 44 blocks, 2,048 wide, shard by shard; prunes each with Wanda on 8 × 256 random tokens in a
process of its own and prints that process's peak resident memory beside the predicted one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

WIDTH, MIDDLE, HEADS, GROUPS, VOCABULARY = 2048, 5632, 32, 4, 32000


def write_model(folder: Path, blocks: int, dtype: torch.dtype) -> None:
    """A Llama of TinyLlama's shape with random weights, written block by block."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=MIDDLE, num_hidden_layers=blocks, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    narrow = WIDTH * GROUPS // HEADS
    where = {}
    for number in range(blocks + 1):
        file = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        prefix = f"model.layers.{number}"
        tensors = {
            f"{prefix}.self_attn.q_proj.weight": matrix(WIDTH, WIDTH),
            f"{prefix}.self_attn.k_proj.weight": matrix(narrow, WIDTH),
            f"{prefix}.self_attn.v_proj.weight": matrix(narrow, WIDTH),
            f"{prefix}.self_attn.o_proj.weight": matrix(WIDTH, WIDTH),
            f"{prefix}.mlp.gate_proj.weight": matrix(MIDDLE, WIDTH),
            f"{prefix}.mlp.up_proj.weight": matrix(MIDDLE, WIDTH),
            f"{prefix}.mlp.down_proj.weight": matrix(WIDTH, MIDDLE),
            f"{prefix}.input_layernorm.weight": torch.ones(WIDTH, dtype=dtype),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(WIDTH, dtype=dtype),
        }
        if number == blocks:
            tensors = {
                "model.embed_tokens.weight": matrix(VOCABULARY, WIDTH),
                "model.norm.weight": torch.ones(WIDTH, dtype=dtype),
                "lm_head.weight": matrix(VOCABULARY, WIDTH),
            }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def measure(folder: Path, blocks: int, name: str) -> dict:
    """Prune one model in a process of its own; returns the command's JSON, shortened."""
    model, out = folder / f"{name}-{blocks}", folder / f"{name}-{blocks}-pruned"
    if not model.exists():
        write_model(model, blocks, getattr(torch, name))
    ids = folder / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, VOCABULARY, size=(8, 256)))
    command = [sys.executable, "-m", "prunus", "prune", model, out, "--method", "wanda", "--calibration", ids]
    command += ["--samples", "8", "--length", "256", "--overwrite", "--json"]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    shutil.rmtree(out)
    return {
        "dtype on disk": name,
        "blocks": blocks,
        "parameters": result["parameters"]["model"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "predicted_peak_bytes": result["predicted_peak_bytes"],
        "seconds": result["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the random models go; 10 GB in all")
    parser.add_argument("--blocks", type=int, nargs="+", default=[22, 44])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"), help="keeps each row")
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    done = {(row["dtype on disk"], row["blocks"]) for row in rows}
    for name in arguments.dtype:
        for blocks in arguments.blocks:
            if (name, blocks) in done:
                continue
            rows.append(measure(arguments.folder, blocks, name))
            row = rows[-1]
            print(
                f"{name:9s} {blocks:3d} blocks  {row['parameters'] / 1e9:.2f} B parameters  "
                f"peak {row['peak_rss_bytes'] / 1e9:.3f} GB  predicted {row['predicted_peak_bytes'] / 1e9:.3f} GB  "
                f"prune {row['seconds']['prune']:.0f} s",
                flush=True,
            )
            shutil.rmtree(arguments.folder / f"{name}-{blocks}")
            arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
