"""Checkpoints that are broken, hostile or of the wrong kind: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunus.cli import main

MODEL = Path(__file__).parent / "assets" / "stories260k"


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_the_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])


def claim_a_huge_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def edit_header(**values: object) -> Callable[[Path], None]:
    """Change the last tensor's entry in the header; a value of None takes the key away."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        last = max(
            (name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1]
        )
        header[last] = {key: value for key, value in {**header[last], **values}.items() if value is not None}
        raw = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return edit


def index(folder: Path, shard: str) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    new = edit(tensors.pop(name))
    if new is not None:
        tensors[name] = new
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poison(value: float, name: str) -> Callable[[Path], None]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return lambda folder: change(folder, name, edit)


def config(**values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


DOWN = "model.layers.2.mlp.down_proj.weight"

# name → what is done to a good model, and words that the sentence must hold
BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), ("config.json",)),
    "unknown model type": (config(model_type="nonesuch", architectures=["Nonesuch"]), ("nonesuch",)),
    "remote code": (
        config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}, model_type="x"),
        ("code", "--trust-remote-code"),
    ),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantised",)),
    "truncated shard": (truncate, ("model.safetensors", "truncated")),
    "header cut": (cut_the_header, ("model.safetensors", "header")),
    "huge header": (claim_a_huge_header, ("model.safetensors", "header")),
    "no shape": (edit_header(shape=None), ("model.safetensors", "entry", "shape")),
    "no dtype": (edit_header(dtype=None), ("model.safetensors", "entry", "dtype")),
    "no offsets": (edit_header(data_offsets=None), ("model.safetensors", "entry", "offsets")),
    "one offset": (edit_header(data_offsets=[0]), ("model.safetensors", "entry", "offsets")),
    "offsets are words": (edit_header(data_offsets=["0", "8"]), ("model.safetensors", "entry", "offsets")),
    "offsets go backwards": (edit_header(data_offsets=[8, 0]), ("model.safetensors", "entry", "offsets")),
    "a negative size": (edit_header(shape=[-1, -64]), ("model.safetensors", "entry", "shape")),
    "shape and bytes disagree": (edit_header(shape=[3]), ("model.safetensors", "shape [3]", "bytes")),
    "an unknown dtype": (edit_header(dtype="F4"), ("model.safetensors", "'F4'")),
    "missing shard": (lambda folder: index(folder, "model-00002-of-00002.safetensors"), ("00002-of-00002", "missing")),
    "shard outside": (lambda folder: index(folder, "../elsewhere.safetensors"), ("../elsewhere", "outside")),
    "index without map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        ("model.safetensors.index.json", "weight_map"),
    ),
    "pickle only": (only_pickle, ("pickle", "save_pretrained")),
    "NaN in a block": (poison(float("nan"), DOWN), (DOWN, "NaN")),
    "infinity in a block": (poison(float("inf"), DOWN), (DOWN, "infinite")),
    "NaN in the embedding": (poison(float("nan"), "model.embed_tokens.weight"), ("embed_tokens", "NaN")),
    "a tensor is missing": (lambda folder: change(folder, DOWN, lambda tensor: None), (DOWN, "no shard")),
    "a tensor has another shape": (lambda folder: change(folder, DOWN, lambda t: t[:-1].clone()), (DOWN, "shape")),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_checkpoint_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    breaking, words = BROKEN[case]
    shutil.copytree(MODEL, tmp_path / "model")
    breaking(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("old")
    (out / "config.json").write_text("{}")
    options = ["--samples", "2", "--length", "32", "--overwrite", "--quiet"]
    assert main(["prune", str(tmp_path / "model"), str(out), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err, said.err
    assert (out / "precious").read_text() == "old"


@pytest.mark.parametrize(
    ("place", "words"),
    [("model", "lies inside"), ("model/out", "lies inside"), (".", "lies inside")],
)
def test_out_in_or_around_the_model_is_refused(
    place: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    assert main(["prune", str(tmp_path / "model"), str(tmp_path / place), "--overwrite"]) == 2
    assert words in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "model").iterdir()} == {path.name for path in MODEL.iterdir()}


def test_a_full_disk_is_noticed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("prunus.job.shutil.disk_usage", lambda path: usage)
    assert main(["prune", str(MODEL), str(tmp_path / "out"), "--samples", "2", "--length", "32"]) == 2
    assert "GB free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_share_an_output(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from prunus.work import Work

    first = Work(tmp_path / "out")
    first.begin({}, restart=False)
    assert main(["prune", str(MODEL), str(tmp_path / "out"), "--samples", "2", "--length", "32", "--quiet"]) == 2
    assert "Another prunus process" in capsys.readouterr().err
    first.close(remove=True)


def test_a_folder_without_a_model_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "documents"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert main(["prune", str(MODEL), str(out), "--overwrite"]) == 2
    assert "holds files but no model" in capsys.readouterr().err
    assert (out / "thesis.txt").exists()


def test_kept_weights_keep_all_bits_when_computed_in_a_narrower_dtype(tmp_path: Path) -> None:
    options = ["--dtype", "bfloat16", "--samples", "4", "--length", "64", "--quiet"]
    assert main(["prune", str(MODEL), str(tmp_path / "out"), *options]) == 0
    dense = load_file(MODEL / "model.safetensors")
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            kept = tensor != 0
            assert torch.equal(tensor[kept], dense[name][kept]), name


def test_out_may_be_written_as_a_relative_or_roundabout_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ["--samples", "2", "--length", "32", "--quiet"]
    assert main(["prune", str(MODEL), "sub/../made here/", *options]) == 0
    assert (tmp_path / "here" / "made here" / "prunus.json").exists()
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["made here"]
