"""Tiny families of transformers 5.23: every row builds offline, in milliseconds, with lively random weights.

One rule (`shrink`) makes a configuration tiny; a row holds only what the rule cannot know. To add a family, add a row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
SPECIAL_TOKENS = 8  # ids below are bos, eos, padding and placeholders; inputs avoid them
DEPTH = 3


@dataclass(frozen=True)
class Family:
    """`name` is the model_type, `overrides` the tiny values beyond `SHARED`, `note` why the row is special."""

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def _same(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# One idea has many names: each value is given under every name a configuration may know it by.
SHARED: dict[str, Any] = {
    **_same(VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    **_same(128, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"),
    **_same(32, "hidden_size hidden_size_global n_embd d_model dim_model emb_dim embedding_size lru_width"),
    **_same(32, "word_embed_proj_dim"),
    **_same(DEPTH, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    **_same(DEPTH, "num_encoder_layers num_decoder_layers max_window_layers"),
    **_same(4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    **_same(4, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    **_same(4, "swa_num_attention_heads linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads"),
    **_same(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups"),
    **_same(8, "head_dim swa_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim"),
    **_same(8, "linear_head_dim global_head_dim dim_head d_head d_kv attention_head_dim query_pre_attn_scalar"),
    **_same(8, "attention_head_size indexer_head_dim local_attn_chunk_length lsh_attn_chunk_length"),
    **_same(4, "qk_rope_head_dim rotary_dim"),
    **_same(48, "intermediate_size ffn_dim n_inner dff dim_ff d_inner encoder_ffn_dim decoder_ffn_dim"),
    **_same(48, "feed_forward_size ffn_hidden_size intermediate_size_mlp shared_intermediate_size"),
    **_same(48, "prefix_dense_intermediate_size dense_intermediate_size"),
    # Multiples of 8: the grouped matrix product of the experts wants aligned rows.
    **_same(16, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    **_same(16, "expert_ffn_hidden_size shared_experts_intermediate_size"),
    **_same(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_same(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    **_same(1, "n_group topk_group num_expert_group indexer_kv_heads first_k_dense_replace num_dense_layers"),
    **_same(16, "q_lora_rank o_lora_rank"),
    **_same(8, "kv_lora_rank laurel_rank gated_norm_rank adapter_rank index_head_dim"),
    **_same(2, "index_n_heads indexer_n_heads n_groups mamba_ngroups mamba_n_groups o_groups"),
    **_same(8, "state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank"),
    **_same(16, "chunk_size mamba_chunk_size sliding_window attention_window_size window_size local_attention"),
    **_same(16, "sliding_window_size attention_chunk_size index_topk"),
    **_same(1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_same(8, "hidden_size_per_layer_input router_hidden_size block_multiple_of hc_lowrank mamba_d_head"),
    **_same(0, "pad_token_id"),
    **_same(1, "bos_token_id decoder_start_token_id"),
    **_same(2, "eos_token_id forced_eos_token_id sep_token_id cls_token_id"),
    **_same(3, "image_token_id image_token_index video_token_id audio_token_id"),
    "logit_scale": 1.0,
    "is_decoder": True,  # an encoder becomes causal by this switch alone
}

# Multi-head latent attention unfolds its one latent for every head, so it knows no groups of heads.
LATENT: dict[str, Any] = {"num_key_value_heads": SHARED["num_attention_heads"]}

# Lists with one entry per block. The first alternates its kinds, a b a b; the second runs them in turn, x x y y.
ALTERNATING = {"layer_types", "layers_block_type", "indexer_types"}
CONSECUTIVE = {"mlp_layer_types"}


def _kinds(default: PreTrainedConfig, names: Iterable[str]) -> dict[str, list[str]]:
    """The distinct block kinds a default configuration mixes, for each per-block list it has."""
    lists: dict[str, list[str]] = {name: list(dict.fromkeys(getattr(default, name) or ())) for name in names}
    return {name: kinds for name, kinds in lists.items() if len(kinds) > 1}


def _mixture(config_class: type[PreTrainedConfig], known: set[str]) -> dict[str, Any]:
    """Per-block lists (and the depth they need) in which every kind of block occurs at least twice."""
    default = config_class()
    alternating, consecutive = _kinds(default, ALTERNATING & known), _kinds(default, CONSECUTIVE & known)
    depth = max((2 * len(kinds) for kinds in (alternating | consecutive).values()), default=0)
    turns = {name: [kinds[i % len(kinds)] for i in range(depth)] for name, kinds in alternating.items()}
    runs = {name: [kinds[i * len(kinds) // depth] for i in range(depth)] for name, kinds in consecutive.items()}
    return turns | runs | ({"num_hidden_layers": depth} if depth else {})


def shrink(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """`SHARED` where the configuration has such a field, then its block kinds, then `overrides`; parts likewise."""
    known = {item.name for item in fields(config_class)}
    shared = SHARED | (LATENT if "kv_lora_rank" in known else {})
    values: dict[str, Any] = {name: value for name, value in shared.items() if name in known}
    parts = {
        name: shrink(part, overrides.get(name, {}))
        for name, part in config_class.sub_configs.items()  # pyright: ignore[reportAttributeAccessIssue]
        if part is not AutoConfig  # a part of no fixed type stays at its default
    }
    values |= _mixture(config_class, known) | dict(overrides) | parts
    return config_class(**values)


def tiny_config(family: Family) -> PreTrainedConfig:
    """The family's configuration, small enough for a test."""
    return shrink(CONFIG_MAPPING[family.name], family.overrides)


def tiny_model(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random float32 model on CPU in eval mode; equal seeds give equal weights."""
    build = CLIPModel._from_config if family.name == "clip" else AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the library draws from the global generator
        model = build(tiny_config(family), dtype=torch.float32).eval()
    enliven(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def enliven(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Matrices ~ N(0, 1/fan_in); all else + N(0, 0.1²), so that a lost norm weight or bias changes the logits.

    The library's own std of 0.02 makes the logits of tiny models nearly constant.
    """
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() > 1 and name.endswith(("weight", "proj")):  # not decay rates, mixing vectors, biases
            value.copy_(noise / value.shape[-1] ** 0.5)
        else:
            value.add_(0.1 * noise)


def tiny_inputs(family: Family, samples: int = 4, length: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Random `input_ids [samples, length]`; for CLIP also one image per text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SPECIAL_TOKENS, VOCABULARY, (samples, length), generator=generator)
    if family.name != "clip":
        return {"input_ids": ids}
    size = tiny_config(family).vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.randn(samples, 3, size, size, generator=generator)}


def save_tiny(family: Family, folder: Path, seed: int = 0) -> Path:
    """Write configuration and safetensors to `folder`, as a user's checkpoint would lie there; return it."""
    tiny_model(family, seed).save_pretrained(folder)
    return folder


# Rows the shared values make tiny without any help.
_PLAIN = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "bart",
    "beam",
    "bert",
    "bert-generation",
    "bigbird_pegasus",
    "biogpt",
    "bitnet",
    "blenderbot",
    "blenderbot-small",
    "camembert",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cwm",
    "data2vec-text",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "diffllama",
    "doge",
    "dots1",
    "electra",
    "ernie",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "kimi_linear",
    "kolibri1",
    "lfm3",
    "llama",
    "marian",
    "mbart",
    "megatron-bert",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "mpt",
    "mvp",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "opt",
    "pegasus",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "plbart",
    "prophetnet",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
    "seed_oss",
    "solar_open",
    "stablelm",
    "starcoder2",
    "trocr",
    "vaultgemma",
    "whisper",
    "xglm",
    "xlm-roberta",
    "xlm-roberta-xl",
]

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
_CONVOLUTION = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
_SLIDING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}

_SLIDING_HEADS = {  # arguments, not fields: the shared values do not reach them
    **_same(4, "swa_num_attention_heads swa_num_key_value_heads"),
    **_same(8, "swa_kv_lora_rank swa_qk_nope_head_dim swa_v_head_dim"),
    "swa_q_lora_rank": 16,
    "swa_head_dim": 12,
}

_PARTICULAR = (
    Family("bamba", {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], "mamba_d_head": 16}),
    Family("big_bird", {"attention_type": "original_full"}, "short texts never use its sparse attention"),
    Family("bloom", note="blocks return a tuple"),
    Family(
        "blt",
        {"use_cache": False, "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
        "four towers",
    ),
    Family("cohere_compass_text", {**_SLIDING, "rope_parameters": dict.fromkeys(_SLIDING["layer_types"], _ROPE)}),
    Family("cpmant", note="legacy blocks in cpmant.encoder.layers"),
    Family("ctrl", note="legacy blocks in transformer.h"),
    Family(
        "dbrx",
        {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"moe_top_k": 2}},
        "the library's default clip_qkv and rope_theta do not run",
    ),
    Family(
        "deepseek_v4",
        {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
        "four parallel residual streams",
    ),
    Family("dots3_note_text", _SLIDING_HEADS),
    Family("falcon", note="blocks return a tuple; FalconLinear subclasses Linear"),
    Family("falcon_h1", {"mamba_d_ssm": 64, "mamba_d_head": 16}),
    Family("falcon_mamba", note="no attention"),
    Family(
        "gemma3n_text",
        {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
        "shared keys and values",
    ),
    Family("gemma4_text", {"global_head_dim": 16, "num_kv_shared_layers": 2}, "later blocks reuse keys and values"),
    Family("gemma4_unified_text", {"global_head_dim": 16}),
    Family("glm_moe_dsa", {"indexer_types": ["full", "shared"] * 2}, "a block hands its token choice to the next"),
    Family("gpt_neo", {"num_layers": 4, "attention_types": [[["global", "local"], 2]]}),
    Family("gpt_neox_japanese", note="legacy blocks in gpt_neox_japanese.layers"),
    Family("granitemoehybrid", {**_HYBRID, "mamba_d_head": 16}),
    Family("hrm_text", note="two lists of blocks, each run several times"),
    Family("hy_v4", note="a block hands its token choice to the next"),
    Family("inkling2_text", {"n_layers_per_attn_res_block": 2}, "blocks read a list of earlier results"),
    Family("inkling_text", {"logits_mup_width_multiplier": 1.0}),
    Family("jamba", {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    Family("jetmoe", {"kv_channels": 8}),
    Family("laguna", _SLIDING),
    Family("lfm2", _CONVOLUTION),
    Family("lfm2_moe", _CONVOLUTION),
    Family("llama4_text", {"interleave_moe_layer_step": 2}),
    Family("longcat_flash", {"head_dim": 4, "zero_expert_num": 2}),
    Family("mamba", note="no attention"),
    Family("mamba2", {"num_heads": 8}, "no attention"),
    Family("mellum", _SLIDING),
    Family("minicpm3", {"dim_model_base": 32}),
    Family("moshi", note="its text model alone"),
    Family("openai-gpt", note="legacy blocks in transformer.h"),
    Family("qwen4_exp_text", {"indexer_budget": 16, "indexer_compress_ratio": 4}),
    Family("recurrent_gemma", {"num_hidden_layers": 6}),
    Family(
        "reformer",
        {"attn_layers": ["local", "lsh"] * 2, "axial_pos_embds": False, "num_buckets": 4, "hash_seed": 0},
        "legacy blocks in reformer.encoder.layers take and return two streams",
    ),
    Family("rembert", {"input_embedding_size": 16, "output_embedding_size": 32}),
    Family(
        "roc_bert",
        {"pronunciation_vocab_size": 128, "pronunciation_embed_dim": 8, "shape_vocab_size": 128, "shape_embed_dim": 8},
    ),
    Family("rwkv", note="no attention; blocks return a tuple with their state"),
    Family("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    Family("xlm", note="no blocks: attentions and ffns are separate lists in transformer"),
    Family("xlnet", note="legacy blocks in transformer.layer; attention weights are bare parameters"),
    Family("xlstm", {"hidden_size": 64, "qk_dim_factor": 1.0}, "no attention; blocks return a tuple"),
    Family("xmod", {"default_language": "en_XX"}),
    Family("zamba", note="hybrid blocks share one attention block's weights"),
    Family("zamba2", note="hybrid blocks share one attention block's weights"),
    Family("youtu", {"pad_token_id": None}, "loading zeroes the embedding of the padding token"),
    Family("clip", {"projection_dim": 32, "vision_config": {"image_size": 16, "patch_size": 4}}, "two towers"),
)

FAMILIES: dict[str, Family] = {row.name: row for row in (*map(Family, _PLAIN), *_PARTICULAR)}

# Entries of the library's causal-LM table without a row here, and why.
_WRAPPERS = {  # its language model is the row named on the right
    "dots3_note": "dots3_note_text",
    "fuyu": "persimmon",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "got_ocr2": "qwen2",
    "llama4": "llama4_text",
    "moss_transcribe_diarize": "qwen3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}

EXCLUDED: dict[str, str] = {
    **{name: f"Vision or audio wrapper of {text}." for name, text in _WRAPPERS.items()},
    "emu3": "AutoModelForCausalLM resolves it to its text configuration, which the library cannot map to a model.",
    "gemma4_assistant": "Drafts for a target model and cannot run without that model's key-value states.",
    "gemma4_unified_assistant": "Drafts for a target model and cannot run without that model's key-value states.",
    "git": "Vision-language captioner; a run on text alone leaves its image tower idle.",
    "gpt-sw3": "A second name of gpt2: same configuration and model class.",
    "mllama": "AutoModelForCausalLM resolves it to its text configuration, which the library cannot map to a model.",
    "musicgen": "Music model: logits are over several audio codebooks, not one vocabulary.",
    "musicgen_melody": "Music model: logits are over several audio codebooks, not one vocabulary.",
    "phi4_multimodal": "Vision and speech towers inside the language model; a run on text alone leaves them idle.",
    "zaya": "The library's loading resets the last entry of every router's balancing bias to -1.",
}
