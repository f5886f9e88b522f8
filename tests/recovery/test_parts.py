"""Laws of single parts: gradients, ranks, schedules, distances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import half, job_of

from prunus.bitmap import pack
from prunus.recovery import RECOVERIES
from prunus.recovery.effective import _Apply
from prunus.recovery.forms import Masked, RowsTimesColumns, Scaled, group, kaiming, ones
from prunus.recovery.lisa import drawn
from prunus.recovery.objectives import Logits
from prunus.recovery.prilora import prune_rows, ranks
from prunus.recovery.student import Student, loaded

RANDOM = torch.Generator().manual_seed(3)
ROWS, COLUMNS, RANK = 11, 16, 4


def case(form: str):
    """A sparse weight, its mask, a form with random parameters, and the same effective weight in plain words."""
    weight = half(torch.randn(ROWS, COLUMNS, generator=RANDOM)).double()
    keep = weight != 0
    a = torch.randn(RANK, COLUMNS, generator=RANDOM).double()
    if form == "spp":
        b = torch.randn(ROWS, 1, generator=RANDOM).double()
        template = [o * RANK // ROWS for o in range(ROWS)]
        plain = lambda a, b: weight * (1 + 2.0 * b * a[template])  # noqa: E731
        return weight, keep, RowsTimesColumns(2.0), (a, b), plain
    b = torch.randn(ROWS, RANK, generator=RANDOM).double()
    if form == "masklora":
        return weight, keep, Masked(1.5), (a, b), lambda a, b: weight + 1.5 * keep * (b @ a)
    return weight, keep, Scaled(), (a, b), lambda a, b: weight * (b @ a)


@pytest.mark.parametrize("name", ["masklora", "scalelora", "spp"])
def test_written_gradients_are_those_of_automatic_differentiation(name: str) -> None:
    weight, keep, form, parameters, plain = case(name)
    x = torch.randn(2, 5, COLUMNS, generator=RANDOM).double()
    delta = torch.randn(2, 5, ROWS, generator=RANDOM).double()
    wanted = [value.clone().requires_grad_() for value in (x, *parameters)]
    torch.nn.functional.linear(wanted[0], plain(*wanted[1:])).backward(delta)
    own = [value.clone().requires_grad_() for value in (x, *parameters)]
    output = _Apply.apply(form, weight, pack(keep), own[0], None, *own[1:])
    assert torch.allclose(output, torch.nn.functional.linear(x, plain(*parameters)))
    output.backward(delta)
    for mine, theirs in zip(own, wanted, strict=True):
        assert torch.allclose(mine.grad, theirs.grad)


@pytest.mark.parametrize("name", ["masklora", "scalelora", "spp"])
def test_removed_weights_have_no_say(name: str) -> None:
    weight, keep, form, parameters, _ = case(name)
    gradient = torch.randn(ROWS, COLUMNS, generator=RANDOM).double()
    other = torch.where(keep, gradient, 100.0)
    one = form.gradients(gradient.clone(), weight, pack(keep), parameters)
    two = form.gradients(other, weight, pack(keep), parameters)
    assert all(torch.allclose(x, y) for x, y in zip(one, two, strict=True))
    assert not form.weight(weight, pack(keep), parameters)[~keep].any()


def test_spp_moves_only_the_rows_factors_first() -> None:
    weight, keep, form, (a, b), _ = case("spp")
    zero = torch.zeros_like(b)
    templates, rows = form.gradients(torch.randn(ROWS, COLUMNS).double(), weight, pack(keep), (a, zero))
    assert not templates.any()
    assert rows.abs().min() > 0
    assert group(7, 3, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("spread", "rank"), [(0.0, 1), (0.02, 4)])
def test_equal_entries_keep_scalelora_at_rank_one_and_noise_does_not(spread: float, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator)
    target = weight * (1 + 0.5 * torch.randn(12, 20, generator=generator))
    a, b = (value.requires_grad_() for value in ones(4, (12, 20), spread, generator, torch.device("cpu")))
    assert torch.allclose(b @ a, torch.ones(12, 20), atol=1e-6)
    optimizer = torch.optim.Adam([a, b], lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        (weight * (b @ a) - target).square().sum().backward()
        optimizer.step()
    assert int(torch.linalg.matrix_rank((b @ a).detach(), rtol=1e-4)) == rank


def test_prilora_ranks_are_those_of_the_paper_and_meet_the_budget() -> None:
    assert ranks(12, 4, 12) == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    for blocks in range(1, 40):
        for first, last in ((1, 1), (2, 9), (4, 12), (3, 4)):
            found = ranks(blocks, first, last)
            assert found == sorted(found)
            if blocks > 1:
                assert abs(sum(found) - blocks * (first + last) / 2) <= 0.5


def test_pruning_an_adapter_takes_the_lowest_scores_of_each_row() -> None:
    a = torch.randn(4, 10, generator=RANDOM)
    norm = torch.rand(10, generator=RANDOM)
    before = a.clone()
    prune_rows(a, norm, 0.35)
    gone = a == 0
    assert gone.sum(1).tolist() == [3] * 4
    scores = before.abs() * norm
    for row in range(4):
        assert scores[row][gone[row]].max() <= scores[row][~gone[row]].min()


def test_lisa_draws_blocks_evenly_and_always_the_same() -> None:
    count = torch.zeros(8)
    for interval in range(4000):
        chosen = drawn(8, 2, 5, interval)
        assert len(set(chosen)) == 2
        assert chosen == drawn(8, 2, 5, interval)
        count[chosen] += 1
    expected = 4000 * 2 / 8
    assert float(((count - expected) ** 2 / expected).sum()) < 24.3  # chi-square, 7 degrees, p = 0.001


def test_lisa_keeps_states_only_of_what_is_active(pruned: Path, tmp_path: Path) -> None:
    from prunus.recovery.lisa import Rotation

    job = job_of(pruned, tmp_path / "out", "lisa")
    part = job.recovery.parts[0]
    with loaded(job.stream.weights):
        student = Student(job.model, job.blocks, job.masks, job.stream.weights)
        part.attach(student)
        optimizer = torch.optim.AdamW(student.chosen, lr=1e-3)
        rotation = Rotation(part, student)
        for interval in range(5):
            rotation._rotate(interval, optimizer)
            before = {name: value.detach().clone() for name, value in student.trained().items()}
            job.model(input_ids=job.lessons.train.ids[:1]).logits.square().mean().backward()
            optimizer.step()
            active = [value for value in student.chosen if value.requires_grad]
            assert set(map(id, optimizer.state)) <= set(map(id, active))
            for index, block in enumerate(job.blocks):
                changed = any(
                    not torch.equal(before[f"{block.name}.{name}"], value)
                    for name, value in block.module.named_parameters()
                )
                assert changed == (index in rotation.active)
            optimizer.zero_grad()


def test_lisa_is_planned_by_what_is_active(pruned: Path, tmp_path: Path) -> None:
    found = {}
    for blocks, state in ((2, "drop"), (5, "drop"), (2, "keep")):
        settings = {"blocks": blocks, "state": state, "embeddings": False}
        job = job_of(pruned, tmp_path / f"{blocks}{state}", "lisa", settings=settings)
        values, resting = job.recovery.count(job)
        found[blocks, state] = job.recovery.memory(job, values, resting)["trained"]
    sizes = {sum(value.numel() for value in block.module.parameters()) for block in job.blocks}
    assert len(sizes) == 1
    assert found[5, "drop"] == 16 * values
    assert found[2, "drop"] == 16 * values - 12 * 3 * sizes.pop()  # three blocks: no gradient, no moments
    assert found[2, "drop"] < found[2, "keep"] < found[5, "drop"]


def test_lisa_measures_its_pace_with_the_gradients_of_its_first_blocks_alone(pruned: Path, tmp_path: Path) -> None:
    job = job_of(pruned, tmp_path / "out", "lisa", settings={"embeddings": False})
    part = job.recovery.parts[0]
    with loaded(job.stream.weights):
        student = Student(job.model, job.blocks, job.masks, job.stream.weights)
        part.attach(student)
        with part.begun(student):
            job.model(input_ids=job.lessons.train.ids[:1]).logits.square().mean().backward()
        having = [any(value.grad is not None for value in block.module.parameters()) for block in job.blocks]
        assert [index for index, has in enumerate(having) if has] == drawn(5, 2, student.seed, 0)
        assert all(value.requires_grad for value in student.chosen)


def test_ebft_decays_a_weight_by_as_much_in_a_step_as_published() -> None:
    ebft = RECOVERIES["ebft"]
    assert ebft.lr * ebft.decay == pytest.approx(2e-4 * 0.1)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    logits = torch.randn(2, 6, 9, generator=RANDOM, requires_grad=True)
    labels = torch.randint(0, 9, (2, 6))
    labels[:, 0] = -100
    for temperature in (1.0, 2.0):
        part = Logits(temperature=temperature)
        dense = (logits.detach() / temperature).log_softmax(-1)
        loss = part.distance(logits, labels, (dense, None))
        assert abs(float(loss.detach())) < 1e-5
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(gradient.abs().max()) < 1e-5


def test_all_tokens_kept_on_disk_are_the_exact_distance() -> None:
    logits, dense = torch.randn(2, 2, 6, 9, generator=RANDOM).unbind(0)
    labels = torch.zeros(2, 6, dtype=torch.long)
    log_p = dense.log_softmax(-1)
    best, token = log_p.topk(9, dim=-1)
    exact = Logits().distance(logits, labels, (log_p, None))
    assert torch.allclose(Logits().distance(logits, labels, (best, token)), exact, rtol=1e-4)
    best, token = log_p.topk(3, dim=-1)
    part = Logits().distance(logits, labels, (best, token))
    assert 0 < part < exact  # what is lumped together cannot be told apart


def test_kaiming_begins_between_its_bounds() -> None:
    a = kaiming(100, 25, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert 0.19 < float(a.max()) <= 0.2
    assert -0.2 <= float(a.min()) < -0.19
