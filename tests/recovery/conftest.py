from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from helpers import OPEN, make


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().work.close()


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a result in this process: a fresh one costs more than the recovery."""
    from prunus.verify import compare

    monkeypatch.setattr("prunus.recovery.run.verify", compare)


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "half")
