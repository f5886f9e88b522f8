"""`prunus export`: what is written computes what the source does, and what cannot be carried is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.cli import main
from prunus.errors import FormatError, RecipeError
from prunus.formats import FORMATS, gguf_check
from prunus.formats.gguf_layout import paired
from prunus.formats.gguf_tokens import vocabulary
from shaped import STORIES, cut, logits_by_hand

BIASES = {"self_attn.o_proj": 0.1, "mlp.down_proj": 0.1}
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unequal") / "cut"
    cut(STORIES, folder, [3, 3, 2, 1, 3], [128, 128, 96, 64, 32], BIASES)
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "model"
    config = AutoConfig.for_model(
        "qwen3", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return folder


def test_a_folder_that_does_not_load_becomes_one_that_does(unequal: Path, tmp_path: Path) -> None:
    wanted = logits_by_hand(unequal, TOKENS)
    result = prunus.export(unequal, tmp_path / "out")
    assert not result["stock"] and result["check"]["max_difference"] == 0
    got = prunus.load(tmp_path / "out")(TOKENS).logits.double()
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_portable_fills_up_to_one_width_and_says_what_it_costs(unequal: Path, tmp_path: Path) -> None:
    wanted = logits_by_hand(unequal, TOKENS)
    result = prunus.export(unequal, tmp_path / "out", portable=True)
    assert result["stock"] and result["class"] == "LlamaForCausalLM"
    assert any("more numbers" in note for note in result["notes"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # 6 heads do not divide 64 and Mistral has no biases, so the next legal number is taken.
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (8, 4, 128)
    assert not list((tmp_path / "out").glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (stock(TOKENS).logits.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("portable", [True, False])
def test_masks_stay_where_they_fit_and_only_there(unequal: Path, tmp_path: Path, portable: bool) -> None:
    shutil.copytree(unequal, tmp_path / "model")
    (tmp_path / "model" / "prunus.masks").write_bytes(b"of the folder's own shapes")
    prunus.export(tmp_path / "model", tmp_path / "out", portable=portable)
    assert (tmp_path / "out" / "prunus.masks").exists() == (not portable)


def test_portable_is_refused_where_no_stock_class_has_the_bias(qwen3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "biased"
    folder.mkdir()
    for file in qwen3.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.bias"] = torch.randn(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"no place for these biases.*What would"):
        prunus.export(folder, tmp_path / "out", portable=True)
    with pytest.raises(RecipeError, match=r"qwen3 has no place for .*down_proj\.bias"):
        prunus.export(folder, tmp_path / "out.gguf", format="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["biased"]


def test_gguf_carries_unequal_blocks_with_their_biases(unequal: Path, tmp_path: Path) -> None:
    result = prunus.export(unequal, tmp_path / "out.gguf", format="gguf")
    assert (result["arch"], result["type"]) == ("deci", "f32")
    if result["check"]["ran"]:
        assert result["check"]["equal"] + result["check"]["ties"] >= 3
        assert result["check"]["relative_difference"] < 1e-4


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_gguf_in_fewer_bits_is_smaller_and_still_close(kind: str, tmp_path: Path) -> None:
    result = prunus.export(STORIES, tmp_path / "out.gguf", format="gguf", type=kind)
    assert result["arch"] == "llama" and result["bytes"] < 0.75 * (STORIES / "model.safetensors").stat().st_size


def test_gguf_of_a_model_with_norms_of_heads(qwen3: Path, tmp_path: Path) -> None:
    assert prunus.export(qwen3, tmp_path / "out.gguf", format="gguf")["arch"] == "qwen3"


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows shorter than the probe, in every other block."""
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, bos_token_id=1, eos_token_id=2,
        layer_types=["sliding_attention", "full_attention"] * 2, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(std=0.3 if "norm" in name else 0.15)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return folder


def test_gguf_of_a_model_with_windows_and_norms_around_every_part(gemma3: Path, tmp_path: Path) -> None:
    result = prunus.export(gemma3, tmp_path / "out.gguf", format="gguf")
    assert result["arch"] == "gemma3"
    if result["check"]["ran"]:
        assert result["check"]["equal"] + result["check"]["ties"] >= 3


@pytest.mark.parametrize(
    "change,words",
    [
        ({"layer_types": ["full_attention", *["sliding_attention"] * 3]}, r"equal distances, and here they are \[0\]"),
        ({"query_pre_attn_scalar": 32}, "root of 16, and the model by that of 32"),
        ({"final_logit_softcapping": 30.0}, "caps no logits"),
    ],
)
def test_gguf_refuses_a_gemma_that_llama_cpp_computes_in_another_way(
    gemma3: Path, change: dict, words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in gemma3.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(RecipeError, match=words):
        prunus.export(folder, tmp_path / "out.gguf", format="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_gguf_keeps_long_rotary_periods(tmp_path: Path) -> None:
    folder = cut(STORIES, tmp_path / "long", [4] * 5, [172] * 5)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    result = prunus.export(folder, tmp_path / "out.gguf", format="gguf")
    assert "48 tensors" in result["holds"]  # those of the dense model, and the factors


def test_a_file_that_computes_something_else_is_not_published(
    unequal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    honest = gguf_check.run_llama

    def wrong(file: Path, texts: list[str], tokens: list[list[int]]):
        cut_texts, logits = honest(file, texts, tokens)
        return cut_texts, [value + torch.linspace(0, 1, value.shape[-1]) for value in logits]

    monkeypatch.setattr(gguf_check, "run_llama", wrong)
    with pytest.raises(FormatError, match="computes other logits"):
        prunus.export(unequal, tmp_path / "out.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_makes_llama_cpp_fall_over_is_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(FormatError, match=r"llama\.cpp does not run the file"):
        gguf_check.run_llama(broken, [], [[1]])


def test_pairing_rows_only_moves_them() -> None:
    rows = torch.arange(24.0)[:, None]
    turned = paired(rows, heads=3)
    assert turned[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(turned.sort(0).values, rows)


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "unk_token": None}
    odd = {"model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(odd))
    with pytest.raises(FormatError, match="cuts text in a way"):
        vocabulary(tmp_path, AutoConfig.from_pretrained(STORIES))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["out", "--format", "ggfu"], "Did you mean 'gguf'"),
        (["out", "--format", "gguf"], "ends with .gguf"),
        (["out.gguf", "--format", "gguf", "--portable"], "--portable means nothing"),
        (["out.gguf", "--format", "gguf", "--type", "q4_k"], "It writes: f32, f16, q8_0, bf16"),
        (["out", "--type", "f16"], "keeps the stored numbers"),
        ([str(STORIES)], "choose another place"),
    ],
)
def test_wrong_options_are_answered_before_any_work(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(STORIES), *words, "-q"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert reason in said
    assert not list(tmp_path.iterdir())


def test_every_format_says_what_it_is() -> None:
    for kind in FORMATS.values():
        assert kind.line and (kind.suffix is None or kind.suffix.startswith("."))
