"""Experts go with their rows of the router: scores by hand, subsets by brute force, what stays computes as masked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.errors import ModelError, RecipeError
from prunus.methods.experts.choice import best
from prunus.methods.experts.scores import RouterWeighted
from prunus.methods.experts.seen import Seen, _count
from prunus.models.discover import find_blocks
from prunus.models.pool import check_keep, closed, fewer, find_pools, parts
from prunus.sites import Block, Pool
from shaped import STORIES

SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "n_shared_experts": 1,
    },
}  # fmt: skip


def mixture(kind: str) -> torch.nn.Module:
    """A model of random weights whose experts and routers differ enough to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "experts" in name or name.endswith((".gate.weight", "e_score_correction_bias")):
            value.data.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model.requires_grad_(False)


def last_pool(model: torch.nn.Module) -> tuple[Block, Pool]:
    block = find_blocks(model)[-1]
    return block, find_pools(block)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_sliced_experts_compute_what_masked_logits_do(kind: str) -> None:
    model = mixture(kind)
    block, pool = last_pool(model)
    mix = parts(block, pool)[2]
    x = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(2))
    size = pool.groups // pool.spans
    keep = (torch.arange(pool.groups) % size) > 0  # the first of every group goes
    dense = mix(x)
    with closed(block, pool, keep):
        masked = mix(x)
    assert torch.equal(mix(x), dense)  # opened again
    fewer(block, pool, keep)
    sliced = mix(x)
    assert torch.allclose(sliced, masked, atol=1e-6)
    assert not torch.allclose(sliced, dense, atol=1e-3)


def test_the_score_is_the_mean_of_gate_times_norm_by_hand() -> None:
    model = mixture("mixtral")
    block, pool = last_pool(model)
    experts = parts(block, pool)[0]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([[0, 1], [0, 2], [1, 0], [2, 1], [0, 1]])
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5], [0.9, 0.1], [0.8, 0.2]])
    seen = Seen(*(torch.zeros(4, dtype=torch.float64) for _ in range(3)))
    _count(experts, seen, x, index, weights)
    for expert in range(4):
        total, tokens = 0.0, 0
        for token in range(5):
            for slot in range(2):
                if index[token, slot] == expert:
                    gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
                    out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    total, tokens = total + float(weights[token, slot] * out.norm()), tokens + 1
        assert float(RouterWeighted()(seen)[expert]) == pytest.approx(total / max(tokens, 1), rel=1e-5)
        assert int(seen.count[expert]) == tokens
    assert RouterWeighted()(seen)[3] == 0  # nobody chose it


def test_the_same_number_goes_from_every_group() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 3.0])
    assert best(scores, 4, spans=2).nonzero().flatten().tolist() == [0, 1, 6, 7]
    assert best(scores, 4, spans=1).nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("kind", "method"), [("mixtral", "naee"), ("deepseek_v3", "reap")])
def test_a_pruned_mixture_loads_in_its_stock_class(kind: str, method: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "dense")
    result = prunus.prune(tmp_path / "dense", tmp_path / "out", method=method, sparsity=0.25, **TEXT)
    assert result["loads"] == "transformers"
    assert result["verify"]["max_difference"] < 1e-5
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    block, pool = last_pool(stock)
    assert pool.groups == len(parts(block, pool)[1].weight) < last_pool(mixture(kind))[1].groups
    if kind == "mixtral":
        assert stock.config.num_local_experts == 3
        gguf = prunus.export(tmp_path / "out", tmp_path / "out.gguf", format="gguf")
        assert (gguf["arch"] == "llama" and not gguf["check"]["ran"]) or gguf["check"]["relative_difference"] < 1e-3


def test_an_interrupted_run_ends_as_a_whole_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunus import shaping

    save("qwen3_moe", tmp_path / "dense")
    options = {"method": "frequency", "sparsity": 0.25, **TEXT}
    prunus.prune(tmp_path / "dense", tmp_path / "whole", **options)
    real, calls = shaping._block, []

    def once(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(shaping, "_block", once)
    with pytest.raises(KeyboardInterrupt):
        prunus.prune(tmp_path / "dense", tmp_path / "out", **options)
    monkeypatch.setattr(shaping, "_block", real)
    assert prunus.prune(tmp_path / "dense", tmp_path / "out", **options)["resumed_blocks"] == 1
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_what_cannot_go_is_refused(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "dense")
    with pytest.raises(RecipeError, match=r"its router needs 2.*sparsity of 0 to 0\.4"):
        prunus.prune(tmp_path / "dense", tmp_path / "out", method="reap", sparsity=0.7, **TEXT)
    with pytest.raises(ModelError, match="no experts"):
        prunus.prune(STORIES, tmp_path / "out", method="reap", sparsity=0.2, **TEXT)
    _, pool = last_pool(mixture("deepseek_v3"))
    with pytest.raises(ModelError, match="equally large"):
        check_keep(pool, torch.tensor([0, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


TEXT = {"calibration": Path(__file__).parent / "assets" / "tinystories-head.txt", "samples": 4, "length": 64}


def save(kind: str, folder: Path) -> None:
    mixture(kind).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
