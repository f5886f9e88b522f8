"""`bench`, `doctor` and `evaluate --engine packed`: what they measure, and what they leave out and say so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Kind

import prunus
from prunus.bench import KINDS, llama
from prunus.bench.run import Setup, bench
from prunus.bench.text import bench_text
from prunus.cli import main
from prunus.errors import FormatError, PrunusError, RecipeError
from prunus.formats import FORMATS
from prunus.formats.gguf_check import OtherLogits
from prunus.runtime.native import available

STORIES = Path(__file__).parent / "assets" / "stories260k"
KEYS = {
    "engine", "phase", "tokens", "tokens_per_second", "spread", "bytes_per_token", "file_bytes", "peak_rss_bytes",
    "note",
}  # fmt: skip

kernels = pytest.mark.skipif(available() is None, reason="no compiled kernels here")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    prunus.prune(STORIES, place / "pruned", method="magnitude", sparsity=0.7)
    prunus.export(place / "pruned", place / "packed", format="packed", type="int8")
    return place / "packed"


@kernels
def test_every_engine_has_a_row_for_each_phase_and_what_is_missing_is_named(packed, capsys, monkeypatch):
    monkeypatch.setattr("prunus.bench.run.find_spec", lambda name: None)
    words = ["--against", "hf-fp32,dense-int8,llama.cpp", "--tokens", "8", "--prompt", "12", "--rounds", "2"]
    assert main(["bench", str(packed), *words, "--threads", "1", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(row["engine"], row["phase"]) for row in found["rows"]} == {
        (engine, phase) for engine in ("packed-int8", "hf-fp32", "dense-int8") for phase in ("prefill", "decode")
    }
    assert all(set(row) == KEYS for row in found["rows"])
    assert all(row["tokens_per_second"] > 0 and row["peak_rss_bytes"] > 10**7 for row in found["rows"])
    size = {row["engine"]: row["bytes_per_token"] for row in found["rows"]}
    assert size["packed-int8"] < size["dense-int8"] < size["hf-fp32"]
    (skipped,) = found["skipped"]
    assert skipped["engine"] == "llama.cpp"
    assert "pip install 'prunus[llama]'" in skipped["why"]


@kernels
def test_an_ordinary_folder_is_packed_first_and_the_table_is_readable(packed, capsys):
    words = ["--against", "", "--values", "int4", "--tokens", "4", "--prompt", "4", "--rounds", "1", "-q"]
    assert main(["bench", str(packed.parent / "pruned"), *words]) == 0
    shown = capsys.readouterr().out
    assert "packed-int4" in shown
    assert "tokens/s" in shown
    assert "Medians of 1 rounds" in shown


@kernels
def test_a_baseline_that_dies_or_refuses_is_skipped(packed, monkeypatch, tmp_path):
    (tmp_path / "dying.py").write_text(
        "import os\nclass R:\n bytes_per_token = file_bytes = 1\n"
        " def prefill(self, ids): os._exit(1)\n def decode(self, ids, tokens): return 1.0\n"
        "def open(folder, variant):\n"
        " if variant == 'no':\n  from prunus.errors import PrunusError\n  raise PrunusError('it cannot be')\n"
        " return R()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(prunus.__file__).parent.parent}")
    kind = type(KINDS["hf-fp32"])
    monkeypatch.setitem(KINDS, "dying", kind("dying", {"dying": "yes"}))
    monkeypatch.setitem(KINDS, "refusing", kind("dying", {"refusing": "no"}))
    found = bench(packed, against=["dying", "refusing"], setup=Setup(tokens=2, prompt=2, rounds=1))
    assert {item["engine"]: item["why"] for item in found["skipped"]}.keys() == {"dying", "refusing"}
    assert "it cannot be" in str(found["skipped"])
    assert {row["engine"] for row in found["rows"]} == {"packed-int8"}


@kernels
def test_one_variant_that_cannot_be_discards_no_other_and_one_that_dies_is_tried_the_plainer_way(
    packed, monkeypatch, tmp_path
):
    (tmp_path / "choosy.py").write_text(
        "import os\nfrom prunus.errors import PrunusError\nclass R:\n bytes_per_token = file_bytes = 1\n"
        " def __init__(self, variant): self.variant = variant\n"
        " def prefill(self, ids):\n  if self.variant == 'repacked': os._exit(139)\n  return 1.0\n"
        " def decode(self, ids, tokens): return 1.0\n"
        "def prepare(dense, folder, variant):\n"
        " if variant == 'never': raise PrunusError('it cannot be written')\n"
        "def open(folder, variant): return R(variant)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(prunus.__file__).parent.parent}")
    monkeypatch.syspath_prepend(tmp_path)
    row = type(KINDS["hf-fp32"])(
        "choosy", {"a": "never", "b": "repacked", "c": "as it is"}, dense=True, plainer={"b": ("plain", "not repacked")}
    )
    monkeypatch.setitem(KINDS, "choosy", row)
    found = bench(packed, against=["choosy"], setup=Setup(tokens=2, prompt=2, rounds=1))
    assert found["skipped"] == [{"engine": "a", "why": "it cannot be written"}]
    assert {row["engine"]: row["note"] for row in found["rows"]} == {"packed-int8": "", "b": "not repacked", "c": ""}
    assert "b: not repacked." in bench_text(found)


class Writer:
    """Stands in for the export to GGUF, which leaves a file behind and raises what it is given."""

    def __init__(self, problem: Exception | None) -> None:
        self.problem, self.written = problem, 0

    def write(self, source: Path, out: Path, settings: object) -> None:
        self.written += 1
        out.write_bytes(b"half")
        if self.problem:
            raise self.problem


def test_other_logits_of_llama_cpp_are_said_of_every_file_made_of_them(monkeypatch, tmp_path):
    writer = Writer(OtherLogits("llama.cpp computes other logits"))
    monkeypatch.setitem(FORMATS, "gguf", writer)
    assert llama.prepare(tmp_path, tmp_path, "f16") == "llama.cpp computes other logits"
    monkeypatch.setattr(llama.subprocess, "run", lambda command, **_: Path(command[5]).touch() or Done)
    assert llama.prepare(tmp_path, tmp_path, "q8_0") == "llama.cpp computes other logits"
    assert writer.written == 1


def test_a_half_written_file_is_never_quantised(monkeypatch, tmp_path):
    monkeypatch.setitem(FORMATS, "gguf", Writer(FormatError("the disk is full")))
    for variant in ("f16", "q4_0"):
        with pytest.raises(FormatError, match="disk is full"):
            llama.prepare(tmp_path, tmp_path, variant)


class Done:
    """Of a process that went well."""

    returncode = 0


def k_quants(file, columns):
    """A GGUF file with a matrix of each of these types and widths, and a vector."""
    writer = GGUFWriter(file, "llama")
    for number, (kind, width) in enumerate(columns):
        weights, size = GGML_QUANT_SIZES[kind]
        blocks = numpy.zeros((3, width // weights * size), dtype=numpy.uint8)
        writer.add_tensor(f"{number}.weight", blocks, raw_dtype=kind)
    writer.add_tensor("norm.weight", numpy.zeros(7, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_types_that_stand_in_for_k_quants_are_said(tmp_path):
    whole = [(Kind.Q2_K, 256), (Kind.Q3_K, 512)]
    k_quants(tmp_path / "whole.gguf", whole)
    assert llama._fallbacks(tmp_path / "whole.gguf") == ""
    k_quants(tmp_path / "odd.gguf", [*whole, (Kind.Q5_0, 64), (Kind.Q8_0, 32), (Kind.Q5_0, 576)])
    assert "3 of 5 matrices" in llama._fallbacks(tmp_path / "odd.gguf")
    assert "(2 Q5_0, 1 Q8_0)" in llama._fallbacks(tmp_path / "odd.gguf")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--against", "hf-fp64"], "no baseline 'hf-fp64'"),
        (["--tokens", "1"], "at least 2"),
        (["--rounds", "many"], "whole number"),
        (["--prompt", "513"], "the model has 512 here"),
        (["--tokens", "512"], "529 positions"),
        (["--values", "int8"], "packed already"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
@kernels
def test_bad_questions_are_refused(words, says, packed, capsys):
    assert main(["bench", str(packed), *words, "-q"]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_without_kernels_bench_says_so(packed, monkeypatch):
    monkeypatch.setattr("prunus.runtime.native.available", lambda: None)
    monkeypatch.setattr("prunus.runtime.native.absence", lambda: "no compiler was there")
    with pytest.raises(PrunusError, match="no compiler was there"):
        bench(packed)


def test_doctor_says_what_runs(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    assert "kernels" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["prunus"] == prunus.__version__
    assert (found["isa"] in found["runnable"]) == (available() is not None)
    monkeypatch.setenv("PRUNUS_ISA", "sse9")
    assert main(["doctor"]) == 2


@kernels
def test_the_engines_own_perplexity_stands_beside_the_dense_one(packed, capsys):
    words = ["--engine", "packed", "--baseline", str(packed.parent / "pruned"), "--length", "64", "--windows", "2"]
    assert main(["evaluate", str(packed), *words, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["baseline"]["engine"]) == ("packed", "transformers")
    assert 1 != found["ratio"] == pytest.approx(1, abs=0.02)
    with pytest.raises(RecipeError, match="no engine 'tpu'"):
        from prunus.evaluation.perplexity import evaluate

        evaluate(packed, engine="tpu")
