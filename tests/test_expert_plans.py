"""What methods for experts decide on real mixtures: replays, fields of blocks, counts, resuming, and the warning."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import prunus
from prunus.distributed import Processes
from prunus.errors import RecipeError
from prunus.evidence import Evidence
from prunus.job import Job, prepare
from prunus.methods import EXPERTS
from prunus.methods.compose import compose
from prunus.methods.experts import reception, replay
from prunus.methods.experts.pruning import Experts
from prunus.methods.experts.redundancy import LIMIT
from prunus.methods.shape import Plan
from prunus.models.discover import find_blocks
from prunus.models.pool import closed, find_pools, parts
from prunus.notes import collecting
from prunus.output import Output
from prunus.progress import Silent
from prunus.recipe import Recipe
from prunus.shaping import decide
from shaped import STORIES
from test_experts import KINDS, TEXT, last_pool, mixture, save

CALIBRATION = {"source": str(TEXT["calibration"]), "samples": 4, "length": 64}


def planned(folder: Path, out: Path, restart: bool = True, **prune: Any) -> tuple[Plan, Job]:
    """What `prunus prune` decides before the first cut; nothing is cut or written."""
    warnings: list[str] = []
    with collecting(warnings):
        recipe = Recipe(model=str(folder), prune=prune, calibration=CALIBRATION)
        job = prepare(recipe, out, overwrite=False, processes=Processes(), warnings=warnings)
        job.begin(restart=restart)
        try:
            evidence = Evidence(job.stream, job.batches, job.work, Silent(), job.needs)
            return decide(job, job.method, Output(job), evidence, Silent()), job
        finally:
            job.work.close()


def removed(plan: Plan) -> dict[str, int]:
    return {name: int((~keep).sum()) for name, keep in plan.keep.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_looking_outputs_up_measures_what_running_the_mixture_does(kind, monkeypatch):
    block, pool = last_pool(mixture(kind))
    inputs = [torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    keep = (torch.arange(pool.groups) % (pool.groups // pool.spans)) > 0
    mix = parts(block, pool)[2]
    with torch.no_grad():
        dense = [mix(batch) for batch in inputs]
        with closed(block, pool, keep):
            masked = [mix(batch) for batch in inputs]
    whole = sum(float((one - own).norm()) for one, own in zip(masked, dense, strict=True))
    share = sum(float((one - own).square().sum()) for one, own in zip(masked, dense, strict=True)) / sum(
        float(own.square().sum()) for own in dense
    )
    for limit in (replay.KEPT, 0):
        monkeypatch.setattr(replay, "KEPT", limit)
        one = replay.Replay(block, pool, [((batch,), {}) for batch in inputs])
        assert one.distance(keep) == pytest.approx(whole, rel=1e-4)
        assert one.lost(keep) == pytest.approx(share, rel=1e-4)
        assert one.distance(torch.ones(pool.groups, dtype=torch.bool)) == 0
        with torch.no_grad():
            assert torch.equal(mix(inputs[0]), dense[0]), "nothing stays behind in the module"


def test_an_expert_that_is_never_chosen_has_no_importance():
    block, pool = last_pool(mixture("mixtral"))  # it renormalises, so that who is not chosen has no say at all
    away = torch.randn(32, generator=torch.Generator().manual_seed(5))
    parts(block, pool)[1].weight.data[1] = -10 * away
    inputs = [torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(6)).abs() * away.sign()]
    one = replay.Replay(block, pool, [((batch,), {}) for batch in inputs])
    importance = [one.distance(torch.arange(4) != expert) for expert in range(4)]
    assert importance[1] < 1e-6 * max(importance)
    assert min(importance[0], importance[2], importance[3]) > 1e-2 * max(importance)


@pytest.mark.parametrize("method", EXPERTS)
@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3"])
def test_every_method_removes_the_asked_share_and_leaves_what_routers_need(method, kind, tmp_path):
    save(kind, tmp_path / "dense")
    plan, job = planned(tmp_path / "dense", tmp_path / "out", method=method, sparsity=0.3)
    blocks = {pool.name: pool for block in job.stream.blocks for pool in block.pools}
    size = sum(info.size for block in job.stream.blocks for info in block.infos)
    gone = sum(count * int(blocks[name].weights[0]) for name, count in removed(plan).items())
    unit = max(pool.spans * int(pool.weights[0]) for pool in blocks.values())
    uniform = EXPERTS[method].counts == "uniform"
    assert abs(gone - 0.3 * size) <= unit / 2 * (len(blocks) if uniform else 1)
    for name, pool in blocks.items():
        assert int(plan.keep[name].sum()) >= pool.least
        assert len(set(plan.keep[name].unflatten(0, (pool.spans, -1)).sum(1).tolist())) == 1
    assert not uniform or len(set(removed(plan).values())) == 1


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """Four blocks of eight experts, the first of which matter least."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    for place, layer in enumerate(model.model.layers):
        for value in layer.mlp.parameters():
            value.data.copy_((0.1 + 0.2 * place) * torch.randn(value.shape))
    folder = tmp_path_factory.mktemp("deep") / "dense"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return folder


def test_of_all_combinations_in_a_field_the_best_stays(deep, tmp_path, monkeypatch):
    seen: dict[str, Any] = {}
    real = reception.receive

    def spied(survey, candidates, span, tokens):
        seen["candidates"] = candidates
        seen["chosen"] = real(survey, candidates, span, tokens)
        return seen["chosen"]

    monkeypatch.setattr("prunus.methods.experts.pruning.receive", spied)
    settings = {"method.counts": "uniform", "choice.span": 2, "choice.candidates": 3}
    plan, job = planned(deep, tmp_path / "out", method="moe-i2", sparsity=0.3, settings=settings)
    names = list(seen["candidates"])
    assert list(seen["chosen"]) == names and len(names) == 4
    model = AutoModelForCausalLM.from_pretrained(deep).requires_grad_(False)
    blocks = {block.name: block for block in find_blocks(model)}
    pools = {name: find_pools(block)[0] for name, block in blocks.items()}
    tokens = torch.cat([batch.inputs["input_ids"] for batch in job.batches[:-1]])
    states = model(input_ids=tokens, output_hidden_states=True).hidden_states[: len(names)]

    def behind(field: list[str], masks: list[torch.Tensor]) -> torch.Tensor:
        """What leaves a field on the dense model's inputs: the whole model, its first blocks open."""
        caught = []
        handle = blocks[field[-1]].module.register_forward_hook(lambda m, a, out: caught.append(out))
        openings = [closed(blocks[name], pools[name], mask) for name, mask in zip(field, masks, strict=True)]
        for opening in openings:
            opening.__enter__()
        model(input_ids=tokens)
        for opening in openings:
            opening.__exit__(None, None, None)
        handle.remove()
        return caught[0]

    assert len(states) == 4
    for field in (names[:2], names[2:]):
        options = [seen["candidates"][name] for name in field]
        dense = behind(field, [torch.ones(8, dtype=torch.bool)] * 2)
        errors = {
            places: float((behind(field, [own[p] for own, p in zip(options, places, strict=True)]) - dense).norm())
            for places in itertools.product(range(3), repeat=2)
        }
        chosen = tuple(seen["chosen"][name] for name in field)
        assert errors[chosen] <= min(errors.values()) * (1 + 1e-5)
        assert errors[chosen] <= errors[0, 0]
    for name, pool in pools.items():
        assert torch.equal(plan.keep[pool.name], seen["candidates"][name][seen["chosen"][name]])


def test_a_killed_search_goes_on_where_it_stopped(deep, tmp_path, monkeypatch):
    settings = {"choice.population": 8, "choice.generations": 2, "choice.span": 2, "method.tokens": 64}
    order = {"method": "moe-i2", "sparsity": 0.4, "settings": settings}
    whole, _ = planned(deep, tmp_path / "whole", **order)
    real, looked = reception._Walk._decide, []

    def once(self, step):
        looked.append(step.block.name)
        if len(looked) == 2:
            raise KeyboardInterrupt
        real(self, step)

    monkeypatch.setattr(reception._Walk, "_decide", once)
    with pytest.raises(KeyboardInterrupt):
        planned(deep, tmp_path / "out", restart=False, **order)
    monkeypatch.setattr(Experts, "_without_one", None)  # what was measured is not measured again
    again, _ = planned(deep, tmp_path / "out", restart=False, **order)
    assert len(looked) == 3, "the first field was not decided twice"
    assert len(set(removed(whole).values())) > 1
    for name, keep in whole.keep.items():
        assert torch.equal(again.keep[name], keep)
    assert again.reports == whole.reports


def test_mixtures_of_unequal_size_load_with_the_shipped_file_and_compute_the_same(deep, tmp_path):
    result = prunus.prune(deep, tmp_path / "out", method="moe-i2", sparsity=0.25, **TEXT)
    assert result["loads"] == "code" and result["verify"]["max_difference"] < 1e-5
    probed = [one["gone"][-1] for block in result["blocks"] for one in block["experts"].values()]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    left = [config["per_layer_config"].get(str(i), {"num_local_experts": 8})["num_local_experts"] for i in range(4)]
    assert left == sorted(left) and left[0] < left[-1], "the first mixtures matter least"
    assert [8 - count for count in probed] == [count for count in left if count < 8]
    own, stock = prunus.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    )  # fmt: skip
    assert [len(layer.mlp.experts.down_proj) for layer in stock.model.layers] == left
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(own(input_ids=tokens).logits, stock(input_ids=tokens).logits)
        made = [one.generate(tokens, max_new_tokens=4, do_sample=False) for one in (own, stock)]
    assert torch.equal(*made)


def upcycled(folder: Path, noise: float) -> Path:
    """The real model's feed-forward blocks eight times over, each copy with noise of this share of its size."""
    dense = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    fields = {
        name: getattr(dense.config, name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "rms_norm_eps", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    }  # fmt: skip
    config = MixtralConfig(**fields, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    model.load_state_dict({n: v for n, v in dense.state_dict().items() if ".mlp." not in n}, strict=False)

    def noisy(weight: torch.Tensor) -> torch.Tensor:
        return (weight + noise * weight.std() * torch.randn(weight.shape)).detach()

    for layer, own in zip(model.model.layers, dense.model.layers, strict=True):
        layer.mlp.gate.weight.data.normal_(std=0.5)
        for expert in range(8):
            merged = torch.cat([noisy(own.mlp.gate_proj.weight), noisy(own.mlp.up_proj.weight)])
            layer.mlp.experts.gate_up_proj.data[expert] = merged
            layer.mlp.experts.down_proj.data[expert] = noisy(own.mlp.down_proj.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["reap", "naee"])
def test_copies_may_go_in_peace_and_experts_of_their_own_may_not(method, tmp_path):
    found, settings = {}, {"method.tokens": 128}
    for name, noise in (("copies", 0.1), ("strangers", 10.0)):
        folder = upcycled(tmp_path / name, noise)
        plan, job = planned(folder, tmp_path / f"{name}.out", method=method, sparsity=0.45, settings=settings)
        found[name] = [one for report in plan.reports.values() for one in report["experts"].values()], job.warnings
    copies, quiet = found["copies"]
    strangers, loud = found["strangers"]
    assert quiet == []
    assert all(one["cosine"] > 0.9 and one["lost"][-1] < 0.1 for one in copies)
    assert all(one["cosine"] < 0.5 and one["gone"][-1] == 4 and 0 < one["entropy"] <= 1 for one in strangers)
    (line,) = loud
    assert "not redundant: without 20 of 40" in line and "% of what a mixture puts out" in line
    least = [one["lost"][0] for one in strangers]
    assert ("Remove fewer" in line) == (sum(least) > LIMIT)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method.counts": "cubic"}, "'uniform', 'inverse' or 'rank'"),
        ({"method.tokens": 0}, "method.tokens is 0"),
        ({"choice.population": 3}, "choice.population is 3; it must be at least 4"),
        ({"choice.parents": 1.0}, r"must be in \(0, 1\)"),
        ({"choice.span": 12}, "combinations; at most 1,000"),
        ({"choice.tokens": 3}, "no setting 'tokens'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(deep, tmp_path, settings, words):
    with pytest.raises(RecipeError, match=words):
        planned(deep, tmp_path / "out", method="moe-i2", sparsity=0.2, settings=settings)


def test_portable_keeps_equally_many_of_every_mixture():
    for method in EXPERTS:
        made, _ = compose(method, portable=True)
        assert isinstance(made, Experts) and made.counts == "uniform"
        assert made.choice == EXPERTS[method].choice


def test_more_than_routers_can_spare_is_refused_with_what_can_go(deep, tmp_path):
    with pytest.raises(RecipeError, match=r"its router needs 2. Ask for a sparsity of 0 to 0\.6"):
        planned(deep, tmp_path / "out", method="moe-i2", sparsity=0.9)
    assert not (tmp_path / "out").exists()
