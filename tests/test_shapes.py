"""Folders of narrowed tensors load as what they compute: in a stock class where one fits, else with our file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import prunus
from prunus.errors import FormatError, ModelError
from prunus.models.fitted import is_fitted
from prunus.models.modelling import FILE, TEMPLATES, describe, ours, source
from prunus.shapes import settle
from prunus.shapes.folder import read_shapes
from prunus.shapes.write import write_config
from shaped import STORIES, cut, logits_by_hand

BIASES = {"self_attn.o_proj": 0.1, "mlp.down_proj": 0.1}
TOKENS = torch.arange(3, 23)[None]
UNEQUAL = ([4, 3, 2, 1, 4], [172, 128, 96, 64, 32])


@pytest.mark.parametrize(
    ("groups", "neurons", "biases", "expected"),
    [
        (*UNEQUAL, BIASES, "PrunedLlamaForCausalLM"),
        (*UNEQUAL, {}, "PrunedLlamaForCausalLM"),
        ([2] * 5, [96] * 5, BIASES, "LlamaForCausalLM"),
        ([2] * 5, [96] * 5, {}, "LlamaForCausalLM"),
        ([3] * 5, [96] * 5, BIASES, "PrunedLlamaForCausalLM"),  # 6 heads do not divide 64, Mistral has no biases
        ([3] * 5, [96] * 5, {}, "MistralForCausalLM"),
        ([4] * 5, [172] * 5, BIASES, "LlamaForCausalLM"),
    ],
)
def test_a_settled_folder_computes_what_its_tensors_say(tmp_path: Path, groups, neurons, biases, expected) -> None:
    folder = cut(STORIES, tmp_path / "cut", groups, neurons, biases)
    wanted = logits_by_hand(folder, TOKENS)
    found = settle(folder)
    assert found["class"] == expected
    assert found["stock"] == (not expected.startswith("Pruned"))
    model = prunus.load(folder)
    assert type(model).__name__ == expected
    assert (model(TOKENS).logits.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert settle(folder)["class"] == expected


def test_generation_with_a_cache_gives_the_tokens_of_plain_forward_passes(tmp_path: Path) -> None:
    folder = cut(STORIES, tmp_path / "cut", *UNEQUAL, BIASES)
    settle(folder)
    model = prunus.load(folder)
    grown = model.generate(TOKENS, max_new_tokens=12, do_sample=False, eos_token_id=None)
    chosen = model(grown[:, :-1]).logits.argmax(-1)[:, TOKENS.shape[1] - 1 :]
    assert torch.equal(chosen, grown[:, TOKENS.shape[1] :])


def test_transformers_alone_loads_a_settled_folder(tmp_path: Path) -> None:
    folder = cut(STORIES, tmp_path / "cut", *UNEQUAL, BIASES)
    wanted = logits_by_hand(folder, TOKENS)
    settle(folder)
    code = (
        "import sys; sys.modules['prunus'] = None\n"
        "import torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "torch.save(model(torch.arange(3, 23)[None]).logits, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "may use the global value incorrectly" not in done.stderr
    found = torch.load(tmp_path / "logits.pt").double()
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_per_layer_config_says_the_shapes_of_all_tensors(tmp_path: Path) -> None:
    folder = cut(STORIES, tmp_path / "cut", *UNEQUAL, BIASES)
    settle(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tensors = load_file(folder / "model.safetensors")
    for index, block in enumerate(config.per_layer_config):
        inner, heads = block.intermediate_size, block.num_attention_heads
        assert tensors[f"model.layers.{index}.mlp.down_proj.weight"].shape == (64, inner)
        assert tensors[f"model.layers.{index}.self_attn.o_proj.weight"].shape == (64, heads * config.head_dim)
        assert tensors[f"model.layers.{index}.self_attn.k_proj.weight"].shape[0] == block.num_key_value_heads * 8


def test_a_configuration_without_its_bias_flags_is_refused_not_loaded_without_biases(tmp_path: Path) -> None:
    folder = cut(STORIES, tmp_path / "cut", [2] * 5, [96] * 5, BIASES)
    settle(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_bias"] and config["mlp_bias"]
    (folder / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    with pytest.raises(ModelError, match="biases that its architecture has no place for"):
        prunus.load(folder)


def test_only_our_own_file_is_run_without_being_asked(tmp_path: Path) -> None:
    folder = cut(STORIES, tmp_path / "cut", *UNEQUAL)
    settle(folder)
    assert ours(folder)
    code = (folder / FILE).read_text()
    (folder / FILE).write_text(code.replace("import logging", "import logging, os"))
    assert not ours(folder)
    with pytest.raises(ModelError, match="trust-remote-code"):
        prunus.load(folder)
    (folder / FILE).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Pruned(__import__('os').system('true'))"]
    (folder / "config.json").write_text(json.dumps(config))
    assert not ours(folder)


def test_tensors_that_no_widths_explain_are_refused(tmp_path: Path) -> None:
    folder = cut(STORIES, tmp_path / "cut", [4] * 5, [172] * 5)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"][:100].clone()
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.layers\.2.*up_proj"):
        read_shapes(folder)


FAMILIES = {
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 8},
    "mistral": {"num_key_value_heads": 4, "head_dim": 8, "sliding_window": None},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 8},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {"num_key_value_heads": 4, "pad_token_id": 0},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 8},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_narrow_neurons_of_every_family_are_found_and_load(tmp_path: Path, kind: str) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, **{**sizes, "num_attention_heads": 8, **FAMILIES[kind]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    wanted = _narrow_neurons(model, keep=40)
    model.save_pretrained(tmp_path / "cut")
    found = settle(tmp_path / "cut")
    assert not found["stock"] and len(found["per_layer"]) == 1
    got = prunus.load(tmp_path / "cut")(TOKENS).logits
    assert torch.allclose(got, wanted, atol=1e-5)


def _narrow_neurons(model: torch.nn.Module, keep: int) -> torch.Tensor:
    """Cut the last block's neurons in memory; returns the logits of the model so cut."""
    names = ("gate_proj", "up_proj", "fc1", "c_fc", "gate_up_proj")
    block = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == 2][-1][-1]
    for name, part in block.named_modules():
        last = name.rpartition(".")[2]
        if last in names and hasattr(part, "weight"):
            transposed = type(part).__name__ == "Conv1D"
            axis, length = (1, part.weight.shape[1]) if transposed else (0, part.weight.shape[0])
            rows = torch.arange(keep)
            if last == "gate_up_proj":
                rows = torch.cat([rows, length // 2 + rows])
            part.weight = torch.nn.Parameter(part.weight.index_select(axis, rows))
            if getattr(part, "bias", None) is not None:
                part.bias = torch.nn.Parameter(part.bias[rows])
        elif last in ("down_proj", "fc2") or (last == "c_proj" and "mlp" in name):
            axis = 0 if type(part).__name__ == "Conv1D" else 1
            part.weight = torch.nn.Parameter(part.weight.index_select(axis, torch.arange(keep)))
        if type(part).__name__ == "Conv1D" and last == "c_fc":
            part.nf = keep
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_copy_of_the_dense_model_is_left_as_it_is(tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "same")
    before = (tmp_path / "same" / "config.json").read_bytes()
    assert settle(tmp_path / "same")["stock"]
    assert (tmp_path / "same" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "custom_generate").mkdir() or (folder / "custom_generate/generate.py").write_text(""),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}'),
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json")
            .read_text()
            .replace('"modeling_pruned.Pruned', '"modeling_pruned.Pruned/x--a.Pruned')
        ),
        lambda folder: (folder / "other.py").write_text(""),
    ],
    ids=["generation", "tokenizer", "repository", "file"],
)
def test_other_code_beside_ours_is_not_trusted(spoil, tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    described = describe(config, "LlamaConfig", {"blocks": "model.layers", "biases": []}, {})
    write_config(tmp_path, described)
    assert ours(tmp_path)
    spoil(tmp_path)
    assert not ours(tmp_path)


def test_a_folder_says_which_template_its_file_was_written_from(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    described = describe(config, "LlamaConfig", {"blocks": "model.layers", "biases": []}, {})
    assert described["pruned"]["template"] == max(TEMPLATES)
    write_config(tmp_path, described)
    first = {**described, "pruned": {"blocks": "model.layers", "biases": []}}  # as the first folders were written
    (tmp_path / "config.json").write_text(json.dumps(first))
    (tmp_path / FILE).write_text(source({**described, "pruned": {**described["pruned"], "template": 1}}))
    assert ours(tmp_path)
    unknown = {**described, "pruned": {**described["pruned"], "template": max(TEMPLATES) + 1}}
    (tmp_path / "config.json").write_text(json.dumps(unknown))
    assert not ours(tmp_path), "a later prunus wrote it: this one cannot tell its file"


def test_a_third_party_s_code_is_not_taken_for_ours(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": {"AutoConfig": "evil.Config"}}
    write_config(tmp_path, config)
    assert not (tmp_path / FILE).exists()
    assert not ours(tmp_path)
    linked = tmp_path / "elsewhere.py"
    linked.write_text("kept")
    (tmp_path / FILE).symlink_to(linked)
    write_config(tmp_path, config)
    assert linked.read_text() == "kept"


@pytest.mark.parametrize("text", ["{", "[]", '{"result": null}'])
def test_a_damaged_record_is_no_traceback(text: str, tmp_path: Path) -> None:
    (tmp_path / "prunus.json").write_text(text)
    if text == "{":
        with pytest.raises(ModelError, match="is no JSON"):
            is_fitted(tmp_path)
    else:
        assert not is_fitted(tmp_path)
