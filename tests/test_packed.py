"""The packed format: what it means, that nothing is lost, and that damaged files are refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import prunus
from packed_folders import HOSTILE, MANIFEST, SHARD, read_all, sign_tensors, small_folder, sparse
from prunus.cli import main
from prunus.errors import FormatError, PrunusError
from prunus.models.checkpoint import Checkpoint
from prunus.output import ORDERS
from prunus.packed.folder import PackedFolder
from prunus.packed.matrix import GROUP, KINDS, check
from prunus.packed.pack import pack, quantize_dense
from prunus.packed.reference import dequantize, unpack, unpack_plainly

ASSETS = Path(__file__).parent / "assets"
STORIES = ASSETS / "stories260k"
GOLDEN = json.loads((ASSETS / "packed" / "matrices.json").read_text())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 300), share=st.floats(0, 1), kind=st.sampled_from(sorted(KINDS)),
    ordered=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_packed_is_what_the_plain_loops_read(rows, columns, share, kind, ordered, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * (torch.rand(rows, columns, generator=generator) < share)
    weight = weight.bfloat16() if kind == "bf16" else weight
    order = torch.randperm(columns, generator=generator) if ordered else None
    packed = pack(weight, kind, order)
    check(packed, "it")
    dense = unpack(packed)
    assert torch.equal(dense, torch.tensor(unpack_plainly(packed)).to(dense.dtype))
    if kind in ("fp32", "bf16"):
        assert torch.equal(dense, weight)
    assert ((dense != 0) <= (weight != 0)).all()


@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 254), ("int4", 1 / 7)])
def test_rounding_is_off_by_at_most_half_a_step_of_the_groups_largest(kind, step):
    weight = sparse(16, 3 * GROUP)
    largest = weight.unflatten(1, (-1, GROUP)).abs().amax(2).repeat_interleave(GROUP, 1)
    error = (unpack(pack(weight, kind)) - weight).abs()
    if kind == "int8":  # int4 may clip: then the squared error of the group is what counts
        assert (error <= largest * step * 1.001 + 1e-7).all()
    plain = (weight / largest * 7).round() / 7 * largest
    assert kind == "int8" or (error**2).sum() < ((plain - weight) ** 2).sum()


def test_a_table_is_rounded_like_a_matrix():
    table = torch.randn(5, 300)
    assert (dequantize(quantize_dense(table)) - table).abs().max() < table.abs().max() / 250


def test_weights_that_no_scale_can_reach_are_refused():
    for bad in (float("nan"), float("inf"), 1e30):
        for kind in ("int8", "int4"):
            with pytest.raises(PrunusError, match="Repair"):
                pack(torch.tensor([[1.0, bad]]), kind)
    with pytest.raises(PrunusError, match="NaN"):
        pack(torch.tensor([[1.0, float("nan")]]), "fp32")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_golden_bytes(kind):
    golden = GOLDEN[kind]
    packed = pack(torch.tensor(golden["weight"]).to(torch.float32), kind, torch.tensor(GOLDEN["order"]))
    parts = {"bitmap": packed.bitmap, "values": packed.values, "scales": packed.scales, "order": packed.order}
    found = {
        name: bytes(part.flatten().view(torch.uint8).tolist()).hex() for name, part in parts.items() if part is not None
    }
    assert found == golden["bytes"]
    assert unpack_plainly(packed) == golden["read"]


def test_bytes_per_weight_are_what_the_format_promises():
    weight = torch.randn(256, 1024) * (torch.rand(256, 1024, generator=torch.Generator().manual_seed(0)) < 0.3)
    limits = {"fp32": 1.34, "bf16": 0.74, "int8": 0.45, "int4": 0.30}
    for kind, most in limits.items():
        assert pack(weight, kind).bytes / weight.numel() < most


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "pruned"
    prunus.prune(STORIES, out, method="magnitude", sparsity=0.7)
    return out


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_there_and_back_every_bit_is_the_same(half, pruned, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(pruned, source)
    if half:
        for file in source.glob("*.safetensors"):
            save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    assert main(["export", str(source), str(tmp_path / "packed"), "--format", "packed", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["check"]["exact"]
    assert found["check"]["bytes_per_weight"] < (0.74 if half else 1.34)
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "back"), "--format", "dense", "-q"]) == 0
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.read(before.tensors):
        ((_, other),) = after.read([name])
        assert other.dtype == tensor.dtype
        assert torch.equal(other, tensor)
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_the_orders_of_columns_come_back_too(pruned, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(pruned, source)
    names = [name for name, stored in Checkpoint.open(source).tensors.items() if name.endswith("up_proj.weight")]
    orders = {name: torch.randperm(64, generator=torch.Generator().manual_seed(9)).int() for name in names}
    save_file(orders, source / ORDERS)
    prunus.export(source, tmp_path / "packed", format="packed")
    prunus.export(tmp_path / "packed", tmp_path / "back", format="dense")
    found = load_file(tmp_path / "back" / ORDERS)
    assert len(names) == 5 and found.keys() == orders.keys()
    assert all(torch.equal(found[name], order) for name, order in orders.items())
    prunus.export(tmp_path / "back", tmp_path / "again", format="packed")
    (one,), (two,) = ((place / "packed-00001.safetensors",) for place in (tmp_path / "packed", tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("values", "near"), [("lossless", 1e-5), ("bf16", 0.3), ("int8", 0.5)])
def test_a_packed_model_is_loaded_and_says_the_same(values, near, pruned, tmp_path, caplog):
    prunus.export(pruned, tmp_path / "packed", format="packed", type=values)
    model, dense = prunus.load(tmp_path / "packed"), prunus.load(pruned)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert (model(ids).logits - dense(ids).logits).abs().max() < near
    if values == "lossless":
        how = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(ids, **how), dense.generate(ids, **how))


def test_smaller_on_disk_by_what_was_pruned(pruned, tmp_path):
    for values in ("lossless", "int8", "int4"):
        prunus.export(pruned, tmp_path / values, format="packed", type=values)
    size = {values: PackedFolder.open(tmp_path / values).bytes for values in ("lossless", "int8", "int4")}
    assert size["int4"] < size["int8"] < size["lossless"] < 0.45 * Checkpoint.open(pruned).bytes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export", "PRUNED", "OUT", "--format", "dense"], "is not packed"),
        (["export", "PACKED", "OUT", "--format", "packed"], "is packed already"),
        (["export", "PRUNED", "OUT", "--format", "packed", "--values", "int3"], "int3"),
        (["export", "PRUNED", "OUT", "--format", "packed", "--values", "int8", "--type", "int8"], "give one of them"),
        (["prune", "PACKED", "OUT"], "--format dense"),
        (["inspect", "PACKED"], "--format dense"),
    ],
    ids=lambda value: " ".join(value[:1] + value[3:]) if isinstance(value, list) else None,
)
def test_what_cannot_be_asked_is_answered_with_what_can(words, says, pruned, tmp_path, capsys):
    prunus.export(pruned, tmp_path / "packed", format="packed")
    places = {"PRUNED": str(pruned), "PACKED": str(tmp_path / "packed"), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in words]) == 2
    assert says in " ".join(capsys.readouterr().err.replace("prunus: ", "").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_folder_is_refused(what, tmp_path):
    spoil, says = HOSTILE[what]
    folder = small_folder(tmp_path / "it")
    read_all(folder)
    spoil(folder)
    with pytest.raises(FormatError, match=says):
        read_all(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = small_folder(tmp_path_factory.mktemp("fuzz") / "it")
    return {file.name: file.read_bytes() for file in folder.iterdir()}, read_all(folder)


def mutate(raw: bytes, luck: random.Random) -> bytes:
    """Flip, cut, lengthen, overwrite or repeat a few bytes."""
    changed = bytearray(raw)
    for _ in range(luck.randint(1, 4)):
        at = luck.randrange(len(changed) + 1)
        kind = luck.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << luck.randrange(8)
        elif kind == 1:
            del changed[at : at + luck.randint(1, 64)]
        elif kind == 2:
            changed[at:at] = luck.randbytes(luck.randint(1, 64))
        elif kind == 3:
            changed[at : at + 8] = luck.choice([b"\xff" * 8, b"\0" * 8, b"\0\0\0\0\0\0\0\x80", b"99999999"])
        else:
            changed[at:at] = changed[at : at + luck.randint(1, 200)]
    return bytes(changed)


def refuse_or_read(folder: Path, files: dict[str, bytes], before: dict[str, torch.Tensor], seed: int) -> None:
    """A mutated folder is refused, or reads as it was; one that was signed anew is refused, or read safely."""
    luck = random.Random(seed)
    name, signed = luck.choice([SHARD, SHARD, MANIFEST]), luck.random() < 0.5
    for file, raw in files.items():
        (folder / file).write_bytes(mutate(raw, luck) if file == name else raw)
    if signed and name == SHARD:
        try:
            sign_tensors(folder, load_file(folder / SHARD))
        except (SafetensorError, OSError, ValueError):
            signed = False
    try:
        after = read_all(folder)
    except PrunusError:
        return
    for key, tensor in after.items():
        assert tensor.shape == before[key].shape
        assert torch.isfinite(tensor.float()).all()
        assert signed or torch.equal(tensor, before[key])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_mutated_files_never_crash(seed, small, tmp_path):
    refuse_or_read(tmp_path, *small, seed)


@pytest.mark.slow
def test_ten_thousand_mutated_files_never_crash(small, tmp_path):
    for seed in range(10_000):
        refuse_or_read(tmp_path, *small, seed)
