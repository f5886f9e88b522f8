"""Where models come from: every door opens on a folder that stock transformers loads, or says why not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunus.errors import ModelError
from prunus.models import gguf as gguf_module
from prunus.models import source
from prunus.models.source import ALIASES, default_cache, locate

STORIES = Path(__file__).parent / "assets" / "stories260k"
LLAMA = {"model_type": "llama"}


def folder(place: Path, config: object = LLAMA, files: tuple[str, ...] = ("model.safetensors",)) -> Path:
    """A folder that looks like a model."""
    place.mkdir()
    (place / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name in files:
        (place / name).write_bytes(b"")
    return place


def test_importing_the_module_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, prunus.models.source; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_a_model_folder_is_returned_as_it_is() -> None:
    assert locate(STORIES) == STORIES
    assert locate(str(STORIES)) == STORIES


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ("{not json", ("model.safetensors",), "cannot be read as JSON"),
        ("[1, 2]", ("model.safetensors",), "not a JSON object"),
        (LLAMA, (), "no .safetensors"),
        (LLAMA, ("pytorch_model.bin",), "save_pretrained"),
        ({"model_type": "own", "auto_map": {"AutoModel": "m.M"}}, ("model.safetensors",), "needs remote code"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_with_the_cure(tmp_path, config, files, words) -> None:
    with pytest.raises(ModelError, match=words):
        locate(folder(tmp_path / "model", config, files))


def test_a_folder_without_config_is_refused_and_a_gguf_in_it_is_pointed_at(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        locate(tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"weights\.gguf: give that file"):
        locate(tmp_path)


def test_own_code_is_accepted_with_the_flag_or_where_transformers_has_the_class_itself(tmp_path) -> None:
    own = folder(tmp_path / "own", {"model_type": "own", "auto_map": {"AutoModel": "m.M"}})
    assert locate(own, trust_remote_code=True) == own
    both = folder(tmp_path / "both", {"model_type": "falcon", "auto_map": {"AutoModel": "m.M"}})
    assert locate(both) == both


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_whose_package_is_missing_says_how_to_install_it(monkeypatch, tmp_path, name) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(source, "version", missing)
    with pytest.raises(ModelError, match=ALIASES[name].install.replace(".", r"\.")):
        locate(name, cache=tmp_path)


@pytest.mark.parametrize(("wrong", "right"), [("smollm", "smollm2"), ("gemma-270m", "gemma3-270m")])
def test_without_a_network_a_misspelt_name_gets_the_nearest(monkeypatch, tmp_path, wrong, right) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"cannot be reached.*Did you mean '{right}'"):
        locate(wrong)


@pytest.mark.parametrize("name", ["", "  ", "./nowhere", "/no/such/folder", "two words", "a/b/c"])
def test_what_cannot_be_a_hub_id_is_refused_without_asking_the_hub(monkeypatch, name) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=r"empty|There is no folder or file"):
        locate(name)


def test_the_cache_is_prunus_cache_before_xdg_before_home(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("PRUNUS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == Path.home() / ".cache" / "prunus"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "prunus"
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"


def test_files_that_are_no_gguf_are_refused_by_what_they_are(tmp_path) -> None:
    for name, content in {"empty": b"", "text": b"hello" * 20, "future": b"GGUF" + bytes([9]) + bytes(40)}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=r"not a GGUF|version 9"):
            locate(tmp_path / f"{name}.gguf", cache=tmp_path / "cache")
    with pytest.raises(ModelError, match=r"not a \.gguf"):
        (tmp_path / "model.onnx").write_bytes(b"")
        locate(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"no file .*emty\.gguf.*'empty\.gguf'"):
        locate(tmp_path / "emty.gguf")


# --- a real GGUF file, written here -----------------------------------------------------------------------------------


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k in GGUF's rotary layout: pairs beside each other instead of half a head apart."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors() -> dict[str, torch.Tensor]:
    state = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).state_dict()
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for block in range(5):
        for theirs, name in NAMES.items():
            weight = state[f"model.layers.{block}.{theirs}.weight"]
            heads = {"attn_q": 8, "attn_k": 4}.get(name)
            tensors[f"blk.{block}.{name}.weight"] = weight if heads is None else permuted(weight, heads)
    return tensors


@pytest.fixture(scope="module")
def stories_gguf(tmp_path_factory) -> Path:
    writer_class = pytest.importorskip("gguf").GGUFWriter
    path = tmp_path_factory.mktemp("gguf") / "stories.gguf"
    writer = writer_class(path, "llama")
    config = json.loads((STORIES / "config.json").read_text())
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    model = json.loads((STORIES / "tokenizer.json").read_text())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    ranks = {
        "".join(pair) if isinstance(pair, list) else pair.replace(" ", ""): -i for i, pair in enumerate(model["merges"])
    }
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([float(ranks.get(piece, -1000)) for piece in pieces])
    writer.add_token_types(
        [2 if i == 0 else 3 if i < 3 else 6 if piece.startswith("<0x") else 1 for i, piece in enumerate(pieces)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in gguf_tensors().items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(stories_gguf, tmp_path_factory) -> Path:
    return locate(stories_gguf, cache=tmp_path_factory.mktemp("cache"))


def test_a_converted_gguf_is_an_ordinary_float32_folder_with_the_same_logits(converted) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        assert (converted / name).is_file(), name
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        ours = AutoModelForCausalLM.from_pretrained(converted)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(STORIES)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert AutoTokenizer.from_pretrained(converted).bos_token_id == 1


def test_the_second_call_converts_nothing(stories_gguf, converted, monkeypatch) -> None:
    monkeypatch.setattr(gguf_module, "_read", lambda path: pytest.fail("converted again"))
    assert locate(stories_gguf, cache=converted.parent.parent) == converted


def test_what_a_killed_conversion_left_is_never_used(stories_gguf, converted, tmp_path) -> None:
    half = tmp_path / "models" / (converted.name + ".partial")
    half.mkdir(parents=True)
    shutil.copy(converted / "config.json", half / "chat_template.jinja.old")
    found = locate(stories_gguf, cache=tmp_path)
    assert found.name == converted.name
    assert not (found / "chat_template.jinja.old").exists()
    assert sorted(file.name for file in (tmp_path / "models").iterdir()) == [".lock", converted.name]


def test_two_files_of_one_name_and_size_are_two_models(stories_gguf, tmp_path) -> None:
    twin = tmp_path / stories_gguf.name
    content = bytearray(stories_gguf.read_bytes())
    content[-1] ^= 1
    twin.write_bytes(content)
    assert gguf_module.fingerprint(twin) != gguf_module.fingerprint(stories_gguf)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.99])
def test_a_truncated_gguf_is_refused_and_leaves_nothing_in_the_cache(stories_gguf, tmp_path, share) -> None:
    content = stories_gguf.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"short\.gguf cannot be read as a GGUF model.*truncated"):
        locate(short, cache=tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(stories_gguf, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="PRUNUS_CACHE"):
        locate(stories_gguf, cache=tmp_path / "file")
