"""Widths of tiny families are found from the zeros of a Jacobian, and removing groups computes what masking does."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, tiny_inputs, tiny_model
from prunus.capture import Recorder
from prunus.edits import blank, narrow
from prunus.models.discover import find_blocks
from prunus.models.width import find_widths, relocated
from prunus.models.widths_of import copied

# Family → kind of width → number of groups in its first block; what is missing cannot be grouped.
FOUND = {
    "llama": {"heads": 2, "neurons": 48},
    "gemma3_text": {"heads": 2, "neurons": 48},  # norms of each head
    "qwen3": {"heads": 2, "neurons": 48},
    "qwen2": {"heads": 2, "neurons": 48},  # biases of q, k and v
    "gpt_neox": {"heads": 4, "neurons": 48},  # q, k and v interleaved by head in one matrix
    "gpt2": {"heads": 4, "neurons": 48},  # one transposed matrix
    "opt": {"heads": 4, "neurons": 48},  # ReLU: half of the gradients are zero
    "phi3": {"heads": 2, "neurons": 48},  # q, k, v and gate, up concatenated
    "bloom": {"heads": 4, "neurons": 128},
    "olmo2": {"neurons": 48},  # a norm over all heads holds them together
    "qwen3_moe": {"heads": 2},  # its neurons are its experts'
}
# Classes that take the number of heads from their configuration, not from the projections.
FIXED_HEADS = {"gpt2", "opt", "phi3", "bloom"}


@pytest.fixture(scope="module", params=FOUND)
def probed(request):
    family = FAMILIES[request.param]
    model = tiny_model(family).requires_grad_(False)
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    blocks = find_blocks(model)
    recorder = Recorder(blocks, lambda block, args, kwargs: type(block.module).forward(block.module, *args, **kwargs))
    with torch.no_grad():
        recording = recorder.record(lambda: model.base_model(**tiny_inputs(family, 1, 12)))
    call, hidden = recording.calls[blocks[0].name], recording.hidden[blocks[0].tower]
    return request.param, blocks, call, hidden, *find_widths(blocks[0], call, hidden)


def test_groups_are_heads_and_neurons(probed):
    name, _, _, _, widths, refusals = probed
    assert {width.kind: width.groups for width in widths} == FOUND[name]
    assert bool(refusals) == (name == "olmo2")


def test_a_group_of_heads_is_one_head_of_keys_and_values_with_its_queries(probed):
    name, blocks, _, _, widths, _ = probed
    for width in widths:
        held = sum(width.weights).item()
        inside = sum(blocks[0].slot(matrix).info.size for matrix in width.matrices())
        assert held == inside, "every weight of these matrices belongs to exactly one group"
        assert len(width.weights.unique()) == 1
        if width.kind == "heads" and name in ("llama", "qwen3", "gemma3_text"):
            queries, keys = (next(m for m in width.rows if m.matrix.endswith(end)) for end in ("q_proj", "k_proj"))
            assert queries.groups.tolist() == [0] * 16 + [1] * 16
            assert keys.groups.tolist() == [0] * 8 + [1] * 8
            assert width.consumer.groups.tolist() == [0] * 16 + [1] * 16


@torch.no_grad()
def test_narrowed_computes_what_masked_does(probed):
    name, blocks, call, hidden, widths, _ = probed
    for width in widths:
        if width.kind == "heads" and name in FIXED_HEADS:
            continue
        twin, keep = copied(blocks[0]), torch.arange(width.groups) % 2 == 0
        dense = call(twin.module, hidden)
        blank(twin, width, keep)
        masked = call(twin.module, hidden)
        narrow(twin, width, keep)
        assert torch.allclose(call(twin.module, hidden), masked, atol=1e-5), width.name
        assert not torch.allclose(masked, dense, atol=1e-3), "the mask must have removed something"
        for matrix in width.matrices():
            assert twin.slot(matrix).info.size < blocks[0].slot(matrix).info.size
            assert tuple(twin.slot(matrix).matrix().weight.shape) == twin.slot(matrix).info.shape


def test_widths_of_another_block_are_the_same_under_its_name(probed):
    _, blocks, _, _, widths, _ = probed
    moved = relocated(widths, blocks[0], blocks[1])
    assert [width.name for width in moved] == [
        width.name.replace(blocks[0].name, blocks[1].name, 1) for width in widths
    ]
    for width in moved:
        assert {blocks[1].slot(matrix).info.block for matrix in width.matrices()} == {blocks[1].name}
