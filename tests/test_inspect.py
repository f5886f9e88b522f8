"""`inspect`: zeros, patterns and provenance of any checkpoint, from its files."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from prunus.cli import main
from prunus.errors import FormatError, ModelError
from prunus.inspection import groups, inspect, matrices, tightest
from prunus.report import inspect_text

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint of one file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def n_of_m(rows: int, columns: int, kept: int, group: int) -> Tensor:
    """Random weights with exactly `kept` non-zeros in every `group` consecutive columns, none of them tiny."""
    generator = torch.Generator().manual_seed(rows + columns + kept + group)
    weight = torch.randn(rows, columns // group, group, generator=generator).sign() * 2
    order = torch.rand(weight.shape, generator=generator).argsort(-1)
    return (weight * (order < kept)).reshape(rows, columns)


def only(result: dict) -> dict:
    """The single matrix of a result."""
    (row,) = matrices(result)
    return row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_both_signs_and_broken_numbers_are_counted(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([[0.0, -0.0, 1.0, -2.0], [float("nan"), 0.0, -0.0, 4.0]]).to(dtype)
    result = inspect(save(tmp_path, {"model.layers.0.a.weight": values}))
    assert (result["zeros"], result["negative_zeros"], result["nan"]) == (4, 2, 1)
    assert only(result)["sparsity"] == 0.5


def test_infinities_are_counted(tmp_path: Path) -> None:
    result = inspect(save(tmp_path, {"x": torch.tensor([float("inf"), -float("inf"), 0.0])}))
    assert (result["infinite"], result["nan"], result["parameters"]) == (2, 0, 3)


@settings(max_examples=25, deadline=None)
@given(columns=st.sampled_from([256, 360, 344]), data=st.data())
def test_a_pattern_is_found_and_no_tighter_one_is_claimed(columns: int, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([size for size in range(2, 65) if columns % size == 0]))
    kept = data.draw(st.integers(1, group - 1))
    weight = n_of_m(64, columns, kept, group)
    with TemporaryDirectory() as folder:
        row = only(inspect(save(Path(folder), {"model.layers.0.a.weight": weight})))
    assert f"{kept}:{group}" in row["patterns"]
    for pattern in row["patterns"]:
        few, many = map(int, pattern.split(":"))
        # The plain statement of N:M, and that N - 1 would be too few.
        counts = [int((weight[:, start : start + many] != 0).sum(1).max()) for start in range(0, columns, many)]
        assert max(counts) == few


def test_every_divisor_up_to_64_is_tried_and_the_one_that_is_recorded() -> None:
    assert groups(48) == [2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert groups(344) == [2, 4, 8, 43]
    assert groups(384, 128)[-2:] == [64, 128]
    assert groups(7) == [7]
    assert groups(1, 10**6) == []


def test_a_wide_pattern_is_found_if_the_record_names_it(tmp_path: Path) -> None:
    save(tmp_path, {"model.layers.0.a.weight": n_of_m(32, 768, 130, 384)})
    assert "130:384" not in only(inspect(tmp_path))["patterns"]
    (tmp_path / "prunus.json").write_text(json.dumps({"recipe": {"prune": {"pattern": "130:384"}}}))
    assert "130:384" in only(inspect(tmp_path))["patterns"]


def test_neither_a_configuration_nor_trust_in_code_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, {"layers.0.w": n_of_m(16, 64, 2, 4)})
    assert main(["inspect", str(tmp_path), "--json", "-q"]) == 0
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}')
    assert main(["inspect", str(tmp_path), "--json", "-q"]) == 0
    assert "2:4" in json.loads(capsys.readouterr().out.splitlines()[-1])["blocks"][0]["patterns"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pattern_holds_in_every_format(dtype: torch.dtype, tmp_path: Path) -> None:
    row = only(inspect(save(tmp_path, {"layers.0.w": n_of_m(16, 64, 2, 4).to(dtype)})))
    assert tightest(row["patterns"]) == ["2:4"]


def test_a_pattern_of_a_transposed_matrix_is_found_along_the_other_axis(tmp_path: Path) -> None:
    row = only(inspect(save(tmp_path, {"h.0.attn.c_attn.weight": n_of_m(48, 64, 2, 4).T})))
    assert (tightest(row["patterns"]), row["axis"]) == (["2:4"], "rows")


def test_one_bad_group_breaks_a_pattern(tmp_path: Path) -> None:
    weight = n_of_m(64, 64, 2, 4)
    weight[17, 20:24] = 1.0
    assert "2:4" not in only(inspect(save(tmp_path, {"layers.0.w": weight})))["patterns"]


def test_experts_are_seen_together_and_the_patterns_hold_in_each(tmp_path: Path) -> None:
    stack = torch.stack([n_of_m(16, 32, 1, 4), n_of_m(16, 32, 2, 4), n_of_m(16, 32, 1, 4)])
    row = only(inspect(save(tmp_path, {"model.layers.0.mlp.experts.gate_up_proj": stack})))
    assert row["shape"] == [3, 16, 32]
    assert "2:4" in row["patterns"]
    assert "1:4" not in row["patterns"]


def test_a_dense_and_an_empty_matrix_have_no_pattern(tmp_path: Path) -> None:
    tensors = {"layers.0.dense": torch.ones(8, 16), "layers.0.gone": torch.zeros(8, 16)}
    assert [row["patterns"] for row in matrices(inspect(save(tmp_path, tensors)))] == [[], []]


def test_blocks_come_in_natural_order_and_the_rest_is_outside(tmp_path: Path) -> None:
    tensors = {f"model.layers.{number}.a.weight": torch.ones(8, 8) for number in (10, 2, 0)}
    tensors |= {"model.embed.weight": torch.zeros(8, 8), "model.layers.0.norm.weight": torch.ones(8)}
    tensors |= {"model.layers.0.conv.weight": torch.ones(8, 1, 4)}
    result = inspect(save(tmp_path, tensors))
    assert [block["name"] for block in result["blocks"]] == ["model.layers.0", "model.layers.2", "model.layers.10"]
    assert {item["name"] for item in result["outside"]} == {"model.embed.weight", "model.layers.0.conv.weight"}
    assert result["pruned_share"] == 0.0
    assert result["sparsity"] == 64 / (4 * 64 + 8 + 32)


def test_other_types_are_named_and_not_counted(tmp_path: Path) -> None:
    result = inspect(save(tmp_path, {"layers.0.q": torch.zeros(8, 8, dtype=torch.int8), "x": torch.ones(2)}))
    assert (result["other_dtypes"], result["parameters"]) == (["int8"], 2)


@pytest.mark.parametrize(
    ("text", "expected"), [('{"recipe": {}}', {"recipe": {}}), ("[1]", None), ("{", None), (None, None)]
)
def test_provenance_is_read_if_it_can_be(text: str | None, expected: object, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "prunus.json").write_text(text)
    assert inspect(save(tmp_path, {"x": torch.ones(2)}))["provenance"] == expected


def test_the_result_is_json(tmp_path: Path) -> None:
    result = inspect(save(tmp_path, {"layers.0.w": n_of_m(8, 16, 2, 4)}))
    assert json.loads(json.dumps(result)) == result


def test_a_truncated_file_and_a_folder_without_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="safetensors"):
        inspect(tmp_path)
    file = save(tmp_path, {"x": torch.ones(1000)}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match="truncated"):
        inspect(tmp_path)


def test_an_empty_tensor_is_no_trouble(tmp_path: Path) -> None:
    assert inspect(save(tmp_path, {"layers.0.w": torch.ones(0, 8), "x": torch.ones(1)}))["parameters"] == 1


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["2:4", "4:8", "8:16"], ["2:4"]),
        (["3:8", "8:16"], ["3:8"]),
        ([], []),
        (["1:2", "1:4"], ["1:2", "1:4"]),
        (["2:4", "4:6", "6:12"], ["2:4", "4:6"]),
    ],
)
def test_what_follows_from_a_tighter_pattern_is_left_out(patterns: list[str], expected: list[str]) -> None:
    assert tightest(patterns) == expected


def test_a_recovered_folder_says_how_it_was_recovered_and_how_pruned_before(tmp_path: Path) -> None:
    versions = {"result": {"versions": {"prunus": "0.1"}}}
    before = {"recipe": {"model": "smollm2", "prune": {"method": "ria", "pattern": "2:4"}}, **versions}
    recipe = {"model": "pruned", "prune": {"method": "wanda"}, "recover": {"method": "masklora", "objective": "text"}}
    (tmp_path / "prunus.json").write_text(json.dumps({"recipe": recipe, "pruned": before, **versions}))
    shown = " ".join(inspect_text(inspect(save(tmp_path, {"x": torch.ones(2)}))).split())
    assert "prunus 0.1, recovered (masklora, text) from pruned; that: prunus 0.1 from smollm2: ria, 2:4" in shown
    assert "wanda" not in shown
    (tmp_path / "prunus.json").write_text(json.dumps({"recipe": recipe, "pruned": {}, **versions}))
    assert "says nothing of its making" in " ".join(inspect_text(inspect(tmp_path)).split())
