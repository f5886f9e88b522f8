"""What a pruned part is given beside its dense twin, and which of its matrices has the last word."""

from __future__ import annotations

import copy

import pytest
import torch

from families import FAMILIES, tiny_inputs, tiny_model
from prunus.models.discover import find_blocks
from prunus.recovery.abreast import Facing
from prunus.recovery.fit import Lesson, weigh
from prunus.recovery.pairs import Wanted, closing, meet, meet_end
from prunus.recovery.parts import find_parts
from test_block_parts import Recorded

CPU = torch.device("cpu")
# Family -> what ends each part: nothing where a norm (Gemma 2, OLMo 2), a mixture of experts, or two branches at once
# stand between a matrix and the residual stream.
LAST = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"], "qwen2": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"], "opt": ["self_attn.out_proj", "fc2"], "mixtral": ["self_attn.o_proj", None],
    "gemma2": [None, None], "olmo2": [None, None], "gpt_neox": [None], "phi": [None], "bloom": [None],
}  # fmt: skip


def facings(name: str) -> tuple[list[Facing], Recorded]:
    """Parts of a block beside those of a copy of it, and how it is called."""
    family = FAMILIES[name]
    model = tiny_model(family).eval()
    twin, block = find_blocks(copy.deepcopy(model))[1], find_blocks(model)[1]
    call = Recorded(model, block, tiny_inputs(family, samples=2, length=12))
    both = [find_parts(one, call, call.hidden) for one in (block, twin)]
    return [Facing(block, own, twin, other) for own, other in zip(*both, strict=True)], call


def lesson(call, inputs, source, facing) -> Lesson:
    """The dense part is given `source`, the pruned one `inputs`."""
    with torch.no_grad(), facing.same.alone():
        targets = call(facing.twin.module, source)
    weights = weigh([targets], [torch.ones(targets.shape[:-1])], by_token=True)
    return Lesson(call, inputs, targets, weights[0], call, source)


@pytest.mark.parametrize("name", LAST)
def test_the_matrix_that_is_added_as_it_is_closes_a_part(name: str) -> None:
    found, call = facings(name)
    last = []
    for facing in found:
        with facing.part.alone():
            slot = closing(facing, lesson(call, call.hidden, call.hidden, facing), CPU)
        last.append(slot and slot.info.name.removeprefix(f"{facing.block.name}."))
    assert last == LAST[name]


@torch.no_grad()
def test_sums_are_over_the_inputs_of_both_models_token_by_token() -> None:
    (attention, mlp), call = facings("qwen2")  # with biases
    generator = torch.Generator().manual_seed(0)
    inputs = call.hidden + 0.1 * torch.randn(call.hidden.shape, generator=generator)
    one = lesson(call, inputs, call.hidden, attention)
    with attention.part.alone():
        last = closing(attention, one, CPU)
        met = meet(attention, last, [one, one], CPU)
    own, dense = attention.block.module, attention.twin.module
    norm, projection = own.get_submodule("input_layernorm"), dense.get_submodule("self_attn.q_proj")
    x, y = norm(inputs).flatten(0, 1), norm(call.hidden).flatten(0, 1)
    w = 2 * one.weights.reshape(-1, 1)
    names = {f"{attention.block.name}.self_attn.{letter}_proj" for letter in "qkv"}
    assert set(met.meetings) == names and len({id(found) for found in met.meetings.values()}) == 1
    found = met.meetings[min(names)]
    wanted = Wanted(projection.get_parameter("weight"), projection.get_parameter("bias"))
    assert torch.allclose(found.hessian, (w * x).T @ x, rtol=1e-4, atol=1e-6)
    assert torch.allclose(wanted.images(found), (w * projection(y)).T @ x, rtol=1e-4, atol=1e-6)
    assert torch.allclose(wanted.total(found), (w * projection(y)).sum(0), rtol=1e-4, atol=1e-6)
    errors = w.reshape(inputs.shape[:-1]) * (met.found[0] - one.targets).square().mean(-1)
    assert sum(met.shares) == pytest.approx(float(errors.sum()), rel=1e-4)
    # What the last matrix is told is what the hidden states lack, whatever happened before.
    two = lesson(call, inputs, call.hidden, mlp)
    seen = []
    down = mlp.block.module.get_submodule("mlp.down_proj")
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with mlp.part.alone():
        last = closing(mlp, two, CPU)
        assert last is not None
        seen.clear()
        end = meet_end(mlp, last, [two], CPU)
    handle.remove()
    z, w = seen[0].flatten(0, 1), two.weights.reshape(-1, 1)
    missing = (two.targets - inputs).flatten(0, 1)
    assert torch.allclose(end.hessian, (w * z).T @ z, rtol=1e-4, atol=1e-7)
    assert torch.allclose(Wanted().images(end), (w * missing).T @ z, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_an_expert_is_fitted_to_what_its_twin_gives_for_its_own_tokens() -> None:
    (_, experts), call = facings("mixtral")
    inputs = call.hidden + 1.0
    one = lesson(call, inputs, call.hidden, experts)
    with experts.part.alone():
        met = meet(experts, None, [one], CPU)
    found = {name: meeting for name, meeting in met.meetings.items() if ".experts." in name}
    assert found and not any(meeting.paired for meeting in found.values())
    assert all(torch.equal(meeting.hessian, meeting.crossed) for meeting in found.values())
