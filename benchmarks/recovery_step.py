"""What a training step of MaskLoRA costs beside one of plain LoRA: CPU seconds, of blocks of SmolLM2's size.

    python benchmarks/recovery_step.py [--blocks 4] [--tokens 2048] [--rounds 3]

Only blocks are measured: embeddings and head, which cost the same in both, would make the ratio look better.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaModel

from prunus.models.discover import find_blocks
from prunus.recovery.adapters import SPP, MaskLoRA, ScaleLoRA
from prunus.recovery.masks import Masks
from prunus.recovery.part import Part
from prunus.recovery.peft_parts import LoRA
from prunus.recovery.student import Student

PARTS: dict[str, Part] = {
    "lora": LoRA(rank=16, alpha=32),
    "masklora": MaskLoRA(),
    "scalelora": ScaleLoRA(),
    "spp": SPP(),
}


def seconds(part: Part, blocks: int, tokens: int, rounds: int) -> float:
    """CPU seconds of one forward and backward pass, the least of some rounds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=blocks, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=128, use_cache=False,
    )  # fmt: skip
    model = LlamaModel(config).requires_grad_(False)
    found = find_blocks(model)
    masks = Masks()
    for block in found:
        for matrix in block.matrices():
            keep = torch.rand(matrix.weight.shape) > 0.5
            matrix.weight.mul_(keep)
            masks.add(matrix.name, keep)
    student = Student(model, found, masks)  # type: ignore[arg-type]
    part.attach(student)
    ids = torch.randint(0, 128, (tokens // 512, 512))
    measured = []
    for _ in range(rounds + 1):
        begun = time.process_time()
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        measured.append(time.process_time() - begun)
    return min(measured[1:])


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found = {name: seconds(part, given.blocks, given.tokens, given.rounds) for name, part in PARTS.items()}
    ratios = {name: value / found["lora"] for name, value in found.items()}
    print(json.dumps({"cpu_seconds": found, "of_lora": ratios, **vars(given)}, indent=1))


if __name__ == "__main__":
    main()
