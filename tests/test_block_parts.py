"""Parts of blocks are found from what a block computes, in any family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import FAMILIES, tiny_inputs, tiny_model
from prunus.models.discover import find_blocks
from prunus.recovery.parts import find_parts
from prunus.sites import Block

# Family -> how many parts a block has: one where attention and MLP are added to the hidden states together (or, BLOOM,
# inside of their modules).
EXPECTED = {
    "llama": 2, "gpt2": 2, "opt": 2, "gemma2": 2, "granite": 2, "mixtral": 2, "qwen3": 2, "olmo2": 2,
    "bloom": 1, "gpt_neox": 1, "phi": 1, "gptj": 1, "falcon": 1,
}  # fmt: skip


class Recorded:
    """How a whole model calls one of its blocks, taken by a hook."""

    def __init__(self, model, block: Block, inputs):
        seen = []
        handle = block.module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        model(**inputs, use_cache=False)
        handle.remove()
        (self.args, self.kwargs) = seen[0]
        self.hidden = self.args[0] if self.args else self.kwargs.pop("hidden_states")
        self.named = not self.args

    def __call__(self, module, hidden):
        args, kwargs = (self.args, self.kwargs)
        result = module(hidden_states=hidden, **kwargs) if self.named else module(hidden, *args[1:], **kwargs)
        return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("name", EXPECTED)
@torch.no_grad()
def test_parts_in_turn_are_the_block(name: str) -> None:
    family = FAMILIES[name]
    model = tiny_model(family).eval()
    block = find_blocks(model)[1]
    call = Recorded(model, block, tiny_inputs(family, samples=2, length=12))
    parts = find_parts(block, call, call.hidden)
    assert len(parts) == EXPECTED[name], [part.name for part in parts]
    assert [slot.info.name for part in parts for slot in part.slots] and {
        slot.info.name for part in parts for slot in part.slots
    } == {slot.info.name for slot in block.slots}
    hidden = call.hidden
    for part in parts:
        with part.alone():
            hidden = call(block.module, hidden)
    assert torch.allclose(hidden, call(block.module, call.hidden), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_part_hears_only_its_own_weights() -> None:
    family = FAMILIES["llama"]
    model = tiny_model(family).eval()
    block = find_blocks(model)[1]
    call = Recorded(model, block, tiny_inputs(family, samples=2, length=12))
    first, second = find_parts(block, call, call.hidden)
    with first.alone():
        before = call(block.module, call.hidden)
    for slot in second.slots:
        slot.matrix().weight.zero_()
    with first.alone():
        assert torch.equal(call(block.module, call.hidden), before)
    with second.alone():
        assert torch.equal(call(block.module, call.hidden), call.hidden)


class Scaled(nn.Module):
    """A block whose second branch looks at its first input again: what lies between two additions is no part."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden):
        first = hidden + self.one(hidden)
        return first + self.two(hidden)


@torch.no_grad()
def test_a_block_that_is_not_the_sum_of_its_parts_is_one_part() -> None:
    holder = nn.Module()
    holder.layers = nn.ModuleList([Scaled()])
    block = find_blocks(holder, blocks="layers")[0]
    call = lambda module, hidden: module(hidden)  # noqa: E731
    parts = find_parts(block, call, torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    assert [part.name for part in parts] == [""]
    assert len(parts[0].slots) == 2
