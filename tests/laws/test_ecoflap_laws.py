"""ECoFLaP: the budget in weights, and trials that leave no trace."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resident import EVEN, UNEVEN, model

from prunus.allocations.ecoflap import ECoFLaP, budget
from prunus.errors import RecipeError
from prunus.sites import Matrix

MILLION = 10**6


@pytest.mark.parametrize(
    "sizes, scores, sparsity, ceiling, wanted",
    [
        ([100] * 4, [10, 1, 1, 1], 0.5, 0.6, [0.29231, 0.56923, 0.56923, 0.56923]),
        ([100, 200, 300], [1, 1, 1], 0.5, 0.6, [0.4, 0.5, 0.53333]),
        ([100] * 4, [1000, 1, 1, 1], 0.3, 0.9, [0.0, 0.4, 0.4, 0.4]),
        ([100] * 2, [7, 1], 0.5, 0.5, [0.5, 0.5]),
        ([100, 300], [0, 0], 0.4, 0.6, [0.4, 0.4]),
        ([100] * 3, [1, 0, 0], 0.2, 0.9, [0.0, 0.3, 0.3]),
    ],
)
def test_the_budget_is_the_formula(sizes, scores, sparsity, ceiling, wanted):
    names = [f"layers.{i}" for i in range(len(sizes))]
    found = budget(
        dict(zip(names, scores, strict=True)),
        {name: size * MILLION for name, size in zip(names, sizes, strict=True)},
        sparsity,
        ceiling,
    )
    assert list(found.values()) == pytest.approx(wanted, abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), blocks=st.integers(1, 6))
def test_exactly_the_wanted_number_stays_within_bounds(data, blocks):
    sizes = {f"l.{i}": data.draw(st.integers(1, 5000)) for i in range(blocks)}
    scores = {name: data.draw(st.floats(0, 1e6)) for name in sizes}
    sparsity = data.draw(st.floats(0, 0.95))
    ceiling = data.draw(st.floats(sparsity, 0.99))
    found = budget(scores, sizes, sparsity, ceiling)
    kept = {name: round(sizes[name] * (1 - value)) for name, value in found.items()}
    assert sum(kept.values()) == math.floor(sum(sizes.values()) * (1 - sparsity) + 1e-6)
    assert all(0 <= value <= ceiling + 1.001 / sizes[name] for name, value in found.items())


def test_a_higher_score_never_makes_a_block_sparser():
    sizes = dict.fromkeys("abcd", 1000)
    last = 1.0
    for score in (0.1, 0.5, 1, 3, 10, 100):
        now = budget({"a": score, "b": 1, "c": 2, "d": 0.3}, sizes, 0.5, 0.8)["a"]
        assert now <= last
        last = now


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_trials_restore_every_bit_and_move_no_global_generator(dtype):
    survey = model(UNEVEN, dtype=dtype)
    before = [matrix.weight.clone() for block in survey.matrices.values() for matrix in block]
    state = torch.get_rng_state()
    ECoFLaP(draws=2).divide(survey, 0.5)
    after = [matrix.weight for block in survey.matrices.values() for matrix in block]
    assert all(
        torch.equal(one.view(torch.int8), other.view(torch.int8)) for one, other in zip(before, after, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_the_estimate_is_the_norm_of_the_gradient_also_for_a_quadratic_loss():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    slope = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    matrix = Matrix("layers.0.m", weight, "layers.0")
    losses = lambda: ((slope * weight).sum() + 3 * weight.square().sum()).reshape(1)  # noqa: E731
    gradient = slope + 6 * weight
    estimate = ECoFLaP(draws=4000)._importance(matrix, losses)
    assert float(estimate) == pytest.approx(math.sqrt(2 / math.pi) * float(gradient.norm()), rel=0.03)


def test_a_one_sided_step_would_not_do():
    """The even term, which differences in both directions cancel, is larger here than the gradient itself."""
    weight = torch.zeros(3, 3, dtype=torch.float64)
    matrix = Matrix("layers.0.m", weight, "layers.0")
    losses = lambda: (1e4 * weight.square().sum()).reshape(1)  # noqa: E731
    assert float(ECoFLaP(draws=10)._importance(matrix, losses)) == pytest.approx(0.0, abs=1e-9)


def test_towers_apart_meet_the_target_each():
    survey = model(EVEN)
    for number, block in enumerate(list(survey.blocks)):
        survey.matrices[f"{'vision' if number < 2 else 'text'}.{number}"] = survey.matrices.pop(block)
        survey.blocks[f"{'vision' if number < 2 else 'text'}.{number}"] = survey.blocks.pop(block)
    from prunus.sites import SiteInfo

    survey.matrices = {
        block: [Matrix(f"{block}.m{i}", m.weight, block) for i, m in enumerate(matrices)]
        for block, matrices in survey.matrices.items()
    }
    survey.sites = [
        SiteInfo(matrix.name, block, tuple(matrix.weight.shape))
        for block, matrices in survey.matrices.items()
        for matrix in matrices
    ]
    found = ECoFLaP(order="first", towers="apart").divide(survey, 0.5)
    for tower in ("vision", "text"):
        own = [site for site in survey.sites if site.block.startswith(tower)]
        lost = sum(found[site.name] * site.size for site in own)
        assert lost == pytest.approx(0.5 * sum(site.size for site in own), abs=1)


def test_a_ceiling_below_the_target_is_refused_with_the_number():
    with pytest.raises(RecipeError, match=r"0\.6"):
        ECoFLaP(ceiling=0.55).divide(model(EVEN), 0.6)
