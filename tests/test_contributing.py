"""The metric that CONTRIBUTING.md shows works as it says, in one file and one row."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import prunus
from prunus.metrics import METRICS, Magnitude, Wanda
from prunus.statistics import InputNorm, SiteStats

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- tests/test_contributing.py runs this block -->\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[ModuleType]:
    """The block as a module."""
    found = BLOCK.search((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert found is not None
    file = tmp_path / "tempered.py"
    file.write_text(found[1], "utf-8")
    spec = importlib.util.spec_from_file_location("tempered", file)
    assert spec is not None and spec.loader is not None
    sys.modules["tempered"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tempered"]


@pytest.mark.parametrize(("power", "same"), [(0.0, Magnitude()), (1.0, Wanda())])
def test_it_lies_between_magnitude_and_wanda(shown: ModuleType, power: float, same: Magnitude | Wanda) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(6, 8, generator=generator), InputNorm(8)
    norms.update(torch.randn(20, 8, generator=generator), 2)
    stats, columns = SiteStats({InputNorm: norms}), slice(2, 7)
    part = weight[:, columns]
    wanted = same(weight, stats)(part, columns)
    assert torch.allclose(shown.Tempered(power)(weight, stats)(part, columns), wanted)


def test_one_row_makes_it_an_option(shown: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "tempered", shown.Tempered())
    assert "tempered" in {row["name"] for row in prunus.catalogue() if row["kind"] == "metric"}
    model = ROOT / "tests" / "assets" / "stories260k"
    options = {"method": "wanda", "metric": "tempered", "settings": {"metric.power": 0.7}, "samples": 4, "length": 64}
    result = prunus.prune(model, tmp_path / "out", **options)
    assert result["metric"] == "tempered"
    assert result["sparsity"]["reached"] == pytest.approx(0.5, abs=1e-3)
