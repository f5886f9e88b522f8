"""The decode loop against transformers, for models of five families."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from prunus.errors import FormatError, ModelError, RecipeError
from prunus.packed.pack import pack, quantize_dense
from prunus.runtime import native as runtime
from prunus.runtime import probe
from prunus.runtime.engine import Engine, covers

pytestmark = pytest.mark.skipif(bool(runtime.absence()), reason=runtime.absence() or "built")

SIZE = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 211, "max_position_embeddings": 96,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": LlamaConfig(**SIZE, rms_norm_eps=1e-5),
    "llama, scaled rotary, biases, tied": LlamaConfig(
        **SIZE, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama, a part of each head rotated": LlamaConfig(
        **SIZE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ),
    "mistral": MistralConfig(**SIZE, sliding_window=9),
    "mistral without a window": MistralConfig(**SIZE, sliding_window=None),
    "qwen2": Qwen2Config(**SIZE),
    "qwen2, windows in some layers": Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=8, layer_types=MIXED),
    "qwen3": Qwen3Config(**SIZE, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SIZE, sliding_window=8, layer_types=MIXED, query_pre_attn_scalar=20),
    "gemma3 with caps": Gemma3TextConfig(
        **SIZE, sliding_window=8, layer_types=MIXED, final_logit_softcapping=3.0, hidden_activation="gelu"
    ),
    "gemma2": Gemma2Config(**SIZE, sliding_window=8, layer_types=MIXED, attn_logit_softcapping=2.0),
}


def random_model(config):
    noise = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter += torch.randn(parameter.shape, generator=noise) * spread
    return model


def text(count: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(seed))


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(family):
    model = random_model(FAMILIES[family])
    ids = text(40)
    with torch.no_grad():
        theirs = model(input_ids=ids[None], use_cache=False).logits[0]
        tokens = model.generate(ids[None], max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 40:]
    engine = Engine(model.config, dict(model.state_dict()), native=runtime.open_native("", 2))
    assert off(engine.prefill(ids, every=True), theirs) < 1e-4
    engine.reset()
    steps = torch.stack([engine.step(int(token)) for token in ids])
    assert off(steps, theirs) < 1e-4
    assert list(engine.generate(ids, 24)) == tokens.tolist()


# Every activation, caps, windows, partial rotation: what each instruction set has a code of its own for.
VARIED = {
    "gemma3": FAMILIES["gemma3"],
    "exact gelu, capped logits": FAMILIES["gemma3 with caps"],
    "capped scores": FAMILIES["gemma2"],
    "silu, part rotated": FAMILIES["llama, a part of each head rotated"],
    "relu": LlamaConfig(**SIZE, hidden_act="relu"),
    "squared relu": LlamaConfig(**SIZE, hidden_act="relu2"),
}


@pytest.mark.parametrize("isa", runtime.runnable())
@pytest.mark.parametrize("family", VARIED)
def test_every_instruction_set_and_number_of_threads_decodes(isa, family):
    model = random_model(VARIED[family])
    ids = text(20)
    with torch.no_grad():
        theirs = model(input_ids=ids[None], use_cache=False).logits[0]
    for threads in (1, 3):
        engine = Engine(model.config, dict(model.state_dict()), native=runtime.open_native(isa, threads), verify=False)
        assert off(torch.stack([engine.step(int(token)) for token in ids]), theirs) < 1e-4
        engine.reset()
        assert off(engine.prefill(ids, every=True), theirs) < 1e-4


def packed_weights(model, kind):
    """Half of the smallest weights of each row removed, columns of some matrices permuted, an int8 head."""
    weights = dict(model.state_dict())
    noise = torch.Generator().manual_seed(9)
    for name, weight in list(weights.items()):
        if weight.ndim == 2 and ".layers." in name:
            kept = weight * (weight.abs() >= weight.abs().median(1, keepdim=True).values)
            order = torch.randperm(weight.shape[1], generator=noise).int() if "k_proj" in name else None
            weights[name] = pack(kept, kind, order)
    weights["lm_head.weight"] = quantize_dense(weights["model.embed_tokens.weight"])
    return weights


@pytest.mark.parametrize("isa", runtime.runnable())
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_rows_have_the_same_bits_whoever_makes_them(isa, kind):
    model = random_model(FAMILIES["gemma3"])
    weights = packed_weights(model, kind)
    logits = []
    for threads in (1, 2, 3):
        engine = Engine(model.config, weights, native=runtime.open_native(isa, threads), verify=False)
        logits.append(torch.stack([engine.step(int(token)) for token in text(20)]))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("isa", runtime.runnable())
@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
def test_a_prompt_in_tiles_gives_what_single_steps_give(isa, kind):
    model = random_model(FAMILIES["gemma3"])
    native = runtime.open_native(isa, 2)
    engine = Engine(model.config, packed_weights(model, kind), native=native, verify=False)
    ids = text(90)
    steps = torch.stack([engine.step(int(token)) for token in ids])
    for parts in ([90], [13, 77], [64, 12, 14], [70, 20]):
        engine.reset()
        tiles = torch.cat([engine.prefill(part, every=True) for part in ids.split(parts)])
        # Where an activation lies between two steps of int8, a last bit decides; it moves a logit by about 1 %. The
        # head is int8 whatever the kind.
        assert off(tiles, steps) < 0.05
        assert ((tiles - steps).abs() / steps.abs().max()).median() < 1e-5
    engine.reset()
    assert off(engine.prefill(ids[:77]), steps[76]) < 0.05


def test_layers_of_different_widths_follow_from_their_matrices():
    model = random_model(FAMILIES["llama"])
    weights = dict(model.state_dict())
    block = model.model.layers[1]
    # One of two groups of three heads, and 17 of 80 hidden units.
    for part, rows in (("q_proj", 36), ("k_proj", 12), ("v_proj", 12)):
        getattr(block.self_attn, part).weight = torch.nn.Parameter(getattr(block.self_attn, part).weight[:rows])
        weights[f"model.layers.1.self_attn.{part}.weight"] = getattr(block.self_attn, part).weight.data
    block.self_attn.o_proj.weight = torch.nn.Parameter(block.self_attn.o_proj.weight[:, :36])
    weights["model.layers.1.self_attn.o_proj.weight"] = block.self_attn.o_proj.weight.data
    for part in ("gate_proj", "up_proj"):
        getattr(block.mlp, part).weight = torch.nn.Parameter(getattr(block.mlp, part).weight[:17])
        weights[f"model.layers.1.mlp.{part}.weight"] = getattr(block.mlp, part).weight.data
    block.mlp.down_proj.weight = torch.nn.Parameter(block.mlp.down_proj.weight[:, :17])
    weights["model.layers.1.mlp.down_proj.weight"] = block.mlp.down_proj.weight.data
    ids = text(12)
    with torch.no_grad():
        theirs = model(input_ids=ids[None], use_cache=False).logits[0]
    assert off(Engine(model.config, weights).prefill(ids, every=True), theirs) < 1e-4


def test_going_back_forgets_what_came_later():
    model = random_model(FAMILIES["qwen3"])
    engine = Engine(model.config, dict(model.state_dict()))
    first, second = text(30), text(30, seed=6)
    once = engine.prefill(torch.cat([first[:10], second]))
    engine.reset()
    engine.prefill(first)
    engine.reset(10)
    assert torch.equal(engine.prefill(second), once)
    with pytest.raises(RecipeError, match="40 tokens"):
        engine.reset(41)


def test_a_seed_draws_the_same_text_again_and_stop_tokens_end_it():
    model = random_model(FAMILIES["llama"])
    engine = Engine(model.config, dict(model.state_dict()))
    drawn = [list(engine.generate(text(5), 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert list(engine.generate(text(5), 20, temperature=1.0, seed=1, stop={drawn[0][4]}))[-1] == drawn[0][4]
    assert len(list(engine.generate(text(5), 20, temperature=1.0, seed=1, stop={drawn[0][4]}))) <= 5
    assert list(engine.generate(text(5), 0)) == []


def test_what_does_not_fit_the_context_is_refused():
    model = random_model(FAMILIES["llama"])
    weights = dict(model.state_dict())
    engine = Engine(model.config, weights, context=16)
    assert len(list(engine.generate(text(10), 7))) == 7
    with pytest.raises(RecipeError, match="10 tokens and 8 new ones do not fit the context of 16"):
        engine.generate(text(10), 8)
    engine.reset()
    engine.prefill(text(16))
    with pytest.raises(RecipeError, match="17 tokens"):
        engine.step(1)
    with pytest.raises(RecipeError, match="prompt is empty"):
        engine.prefill([])
    engine.reset()
    with pytest.raises(RecipeError, match="Token 211"):
        engine.prefill([3, 211])
    with pytest.raises(RecipeError, match="made for 1 to 96"):
        Engine(model.config, weights, context=97)


def test_missing_and_misshapen_weights_are_refused():
    model = random_model(FAMILIES["llama"])
    weights = dict(model.state_dict())
    without = {name: weight for name, weight in weights.items() if not name.endswith("2.mlp.up_proj.weight")}
    with pytest.raises(ModelError, match=r"lack model\.layers\.2\.mlp\.up_proj"):
        Engine(model.config, without)
    with pytest.raises(ModelError, match="vector of 48"):
        Engine(model.config, weights | {"model.norm.weight": torch.ones(47)})
    with pytest.raises(FormatError, match="do not fit together"):
        Engine(model.config, weights | {"model.layers.0.mlp.down_proj.weight": torch.ones(48, 79)})


def test_what_the_engine_lacks_is_named(monkeypatch):
    assert covers(FAMILIES["gemma3"]) is None
    assert "GPT2Model is not built like a Llama" in (covers(GPT2Config(n_layer=1, n_embd=8, n_head=2)) or "")
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "changes with the length" in (covers(LlamaConfig(**SIZE, rope_parameters=dynamic)) or "")
    monkeypatch.setattr(probe, "TOLERANCE", 0.0)
    probe._probe.cache_clear()
    assert "other logits than transformers for llama" in (covers(FAMILIES["llama"]) or "")
    probe._probe.cache_clear()
