"""Local reconstruction on a real model: zeros stay, errors never grow, a killed run ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prunus
from families import FAMILIES, save_tiny, tiny_inputs
from prunus.errors import ModelError, RecipeError
from prunus.output import Output
from prunus.recovery import RECOVERIES, local
from prunus.recovery.masks import Masks
from prunus.recovery.reconstruct import Reconstruct
from prunus.verify import TOLERANCE, compare

MODEL = Path(__file__).parent / "assets" / "stories260k"
LOCAL = [name for name, recovery in RECOVERIES.items() if isinstance(recovery, Reconstruct)]
QUICK = {"method": "reconstruct", "samples": 8, "length": 64, "heldout": 2, "dense": str(MODEL)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread, and the check of every result in this process: a fresh one costs more than the recovery."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("prunus.recovery.run.verify", "prunus.engine.verify"):
            patch.setattr(module, here)
        yield
    torch.set_num_threads(before)


def here(
    folder: Path, probe: Path, dtype: str, device: str, trust_remote_code: bool = False, own: bool = False
) -> dict:
    """The comparison of `verify`, in this process."""
    found = compare(folder, probe, dtype, device, trust_remote_code, own)
    assert found["relative_difference"] <= TOLERANCE[dtype] and not found["missing"]
    return found | {"tolerance": TOLERANCE[dtype]}


def pruned(folder: Path, sparsity: float = 0.5, **options) -> Path:
    prunus.prune(MODEL, folder, method="wanda", sparsity=sparsity, samples=4, length=64, **options)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the weights gone, as prunus leaves it."""
    return pruned(tmp_path_factory.mktemp("half") / "pruned")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def in_dtype(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """The same folder with its weights in another dtype, in one file, and without what prunus knows about it."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*", "prunus.*", "README.md"))
    save_file(
        {name: value.to(dtype) for name, value in tensors(folder).items()}, out / "model.safetensors", {"format": "pt"}
    )
    return out


def lost(before: Path, after: Path) -> int:
    """Removed weights that are not +0.0 to the bit afterwards, in all tensors of which much was removed."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    names = [name for name, value in old.items() if value.ndim > 1 and (value == 0).float().mean() > 0.3]
    assert len(names) >= 5
    gone = [(old[name] == 0, new[name]) for name in names]
    return sum(int(((value != 0) | torch.signbit(value))[zero].sum()) for zero, value in gone)


def parts(result: dict) -> list[dict]:
    return [part for block in result["training"]["blocks"] for part in block["parts"]]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_in_every_pattern_and_dtype(pattern: str, dtype: torch.dtype, tmp_path: Path) -> None:
    start = in_dtype(pruned(tmp_path / "pruned", pattern=pattern), tmp_path / "foreign", dtype)
    result = prunus.recover(start, tmp_path / "out", **QUICK)
    assert lost(start, tmp_path / "out") == 0
    assert result["zeros"]["after"] == result["zeros"]["before"] > 0
    assert list(result["zeros"]["patterns"]) == [pattern]
    old, new = tensors(start), tensors(tmp_path / "out")
    assert all(new[name].dtype == dtype for name in new)
    assert not torch.equal(old["model.layers.0.mlp.down_proj.weight"], new["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])


@pytest.mark.parametrize("method", LOCAL)
def test_every_local_method_loses_no_zero_and_no_ground(method: str, half: Path, tmp_path: Path) -> None:
    result = prunus.recover(half, tmp_path / "out", **{**QUICK, "method": method})
    assert lost(half, tmp_path / "out") == 0
    assert all(part["after"] <= part["before"] for part in parts(result))
    assert sum(part["after"] < part["before"] for part in parts(result)) > len(parts(result)) / 2
    assert result["loss"]["after"] < result["loss"]["before"]


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "masklora"}, {"inputs": "dense"}, {"target": "local"}, {"start": "scales"}, {"start": "none"},
        {"epochs": 0}, {"epochs": 0, "start": "scales"}, {"relative": "energy"}, {"granularity": "block"},
        {"norms": True}, {"clip": 0.1, "decay": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_gains_and_gives_another_model(settings: dict, half: Path, tmp_path: Path, usual: dict) -> None:
    result = prunus.recover(half, tmp_path / "out", **QUICK, settings=settings)
    assert result["loss"]["after"] < result["loss"]["before"]
    assert all(part["after"] <= part["before"] for part in parts(result))
    names = [part["name"] for part in parts(result)]
    assert names == (["block"] * 5 if settings.get("granularity") == "block" else ["self_attn", "mlp"] * 5)
    assert digest(tmp_path / "out") != usual["digest"]
    changed = {n for n, value in tensors(tmp_path / "out").items() if not torch.equal(value, tensors(half)[n])}
    assert ("model.layers.2.input_layernorm.weight" in changed) == settings.get("norms", False)


@pytest.fixture(scope="module")
def usual(half: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """An uninterrupted run with the defaults."""
    out = tmp_path_factory.mktemp("usual") / "out"
    return prunus.recover(half, out, **QUICK) | {"digest": digest(out), "folder": out}


def digest(folder: Path) -> dict[str, str]:
    """Hashes of the weights and of the masks."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".masks")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_matrix_that_closes_a_part_makes_up_for_those_before_it(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told what the hidden states lack, it leaves less than told what its twin gives."""
    found = prunus.recover(half, tmp_path / "told", **QUICK, settings={"epochs": 0})
    monkeypatch.setattr("prunus.recovery.rebuild.closing", lambda *_: None)
    other = prunus.recover(half, tmp_path / "not", **QUICK, settings={"epochs": 0})
    first, second = parts(found)[:2], parts(other)[:2]
    assert all(one["after"] < 0.99 * two["after"] for one, two in zip(first, second, strict=True)), (first, second)


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_ends_with_the_same_bits(
    after: int, half: Path, usual: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], Output.block

    def dying(self, block, report, changed=None):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(block.name)
        write(self, block, report, changed)

    monkeypatch.setattr(Output, "block", dying)
    with pytest.raises(KeyboardInterrupt):
        prunus.recover(half, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
    written, trained, rebuild = [], [], local.rebuild
    monkeypatch.setattr(Output, "block", write)
    monkeypatch.setattr(local, "rebuild", lambda *args: trained.append(args[2].block.name) or rebuild(*args))
    result = prunus.recover(half, tmp_path / "out", **QUICK)
    assert len(trained) == 2 * (5 - after)
    assert digest(tmp_path / "out") == usual["digest"]
    assert result["loss"] == usual["loss"]


def test_one_block_of_each_model_is_in_memory(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild, looked = local.rebuild, []

    def looking(how, job, facing, lessons, together):
        inside = [block for block in job.blocks if any(p.device.type != "meta" for p in block.module.parameters())]
        outside = job.model.get_input_embeddings().weight.device.type
        looked.append(([block.name for block in inside], outside))
        assert inside == [facing.block]
        return rebuild(how, job, facing, lessons, together)

    monkeypatch.setattr(local, "rebuild", looking)
    prunus.recover(half, tmp_path / "out", **QUICK)
    assert len(looked) == 10
    assert {outside for _, outside in looked} == {"meta"}


def test_a_rate_that_diverges_costs_nothing(half: Path, tmp_path: Path) -> None:
    result = prunus.recover(half, tmp_path / "out", **QUICK, lr=1e6, settings={"start": "none"})
    assert all(part["as_given"] and part["after"] == part["before"] for part in parts(result))
    assert any("nothing was gained" in text or "not finite" in text for text in result["warnings"])
    old, new = tensors(half), tensors(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_foreign_checkpoint_needs_its_dense_model_named(half: Path, tmp_path: Path) -> None:
    start = in_dtype(half, tmp_path / "foreign", torch.float32)
    weights = tensors(start)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = torch.where(weights[name] == 0, -0.0, weights[name])
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    options = {key: value for key, value in QUICK.items() if key != "dense"}
    with pytest.raises(RecipeError, match="--dense"):
        prunus.recover(start, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign"]
    result = prunus.recover(start, tmp_path / "out", **QUICK)
    assert lost(start, tmp_path / "out") == 0
    assert result["masks"] == "derived from the zeros"


def test_a_kept_weight_that_is_zero_may_grow(half: Path, tmp_path: Path, usual: dict) -> None:
    """The registry says what is kept, not the zeros."""
    start = tmp_path / "start"
    shutil.copytree(usual["folder"], start)
    name = "model.layers.0.mlp.gate_proj"
    keep = Masks.read(start / "prunus.masks").keep(name)
    row, column = keep.nonzero()[7].tolist()
    for file in start.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            held = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        if f"{name}.weight" in held:
            held[f"{name}.weight"][row, column] = 0.0
            save_file(held, file, {"format": "pt"})
    prunus.recover(start, tmp_path / "out", **QUICK)
    assert tensors(tmp_path / "out")[f"{name}.weight"][row, column] != 0
    assert lost(half, tmp_path / "out") == 0


def test_another_model_is_no_dense_model(half: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    config = json.loads((other / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="block by block"):
        prunus.recover(half, tmp_path / "out", **{**QUICK, "dense": str(other)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"minutes": 5}, "--minutes"), ({"patience": 2}, "--patience"), ({"lr": "auto"}, "lr auto"),
        ({"objective": "logits"}, "hidden states"), ({"settings": {"epochs": 0, "start": "none"}}, "nothing to do"),
        ({"settings": {"warmup": 1.0}}, "warmup is 1"), ({"settings": {"train": "all"}}, "train = 'all'"),
        ({"settings": {"rank": 0}}, "rank is 0"),
    ],
    ids=str,
)  # fmt: skip
def test_what_it_does_not_know_is_refused_before_any_work(options, words, half: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        prunus.recover(half, tmp_path / "out", **{**QUICK, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "names"),
    [("gpt2", ["attn", "mlp"]), ("opt", None), ("mixtral", ["self_attn", "mlp"]), ("gpt_neox", ["block"])],
)
def test_other_families_come_back_too(family: str, names: list[str] | None, tmp_path: Path) -> None:
    """Transposed matrices, biases, fused experts, and blocks that are one part."""
    dense = save_tiny(FAMILIES[family], tmp_path / "dense")
    np.save(tmp_path / "ids.npy", tiny_inputs(FAMILIES[family], samples=12, length=32)["input_ids"].numpy())
    ids = str(tmp_path / "ids.npy")
    prunus.prune(dense, tmp_path / "pruned", method="magnitude", sparsity=0.5, calibration=ids, samples=4, length=32)
    options = {**QUICK, "length": 32, "text": ids, "dense": str(dense)}
    result = prunus.recover(tmp_path / "pruned", tmp_path / "out", **options)
    assert lost(tmp_path / "pruned", tmp_path / "out") == 0
    assert all(part["after"] < part["before"] for part in parts(result))
    if names:
        assert [part["name"] for part in parts(result)] == names * len(result["training"]["blocks"])
    whole = any("as a whole" in text for text in result["warnings"])
    assert whole == (names == ["block"])


def test_steps_are_those_of_each_part_and_a_batch_may_take_several_passes(
    half: Path, usual: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {part["steps"] for part in parts(usual)} == {8}
    at_once = prunus.recover(half, tmp_path / "once", **QUICK, steps=2, batch=8)
    assert {part["steps"] for part in parts(at_once)} == {2}
    monkeypatch.setattr(local, "BATCH_TOKENS", 2 * QUICK["length"])
    in_pieces = prunus.recover(half, tmp_path / "pieces", **QUICK, steps=2, batch=8)
    for one, other in zip(parts(at_once), parts(in_pieces), strict=True):
        assert other["after"] == pytest.approx(one["after"], rel=0.02)
    assert in_pieces["loss"]["after"] == pytest.approx(at_once["loss"]["after"], abs=0.02)


def test_too_little_memory_is_said_before_any_work(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunus.recovery.job.available", lambda: 100_000)
    with pytest.raises(RecipeError, match="--samples"):
        prunus.recover(half, tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())
