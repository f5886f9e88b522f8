"""The table of tiny families itself: each row builds, is finite and lively, and nothing of the library is forgotten."""

import re

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import EXCLUDED, FAMILIES, VOCABULARY, tiny_inputs, tiny_model

TABLE_VERSION = "5.23"


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits_per_text if "logits_per_text" in output else output.logits


def _last_block(model: PreTrainedModel) -> list[Tensor]:
    """Parameters of the deepest block: the first number in their name is the largest."""
    depth = {name: int(found[0]) for name, _ in model.named_parameters() if (found := re.findall(r"\.(\d+)\.", name))}
    return [value for name, value in model.named_parameters() if depth.get(name) == max(depth.values())]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_finite_and_depend_on_the_last_block(name: str) -> None:
    model, inputs = tiny_model(FAMILIES[name]), tiny_inputs(FAMILIES[name], samples=2, length=16)
    before = _logits(model, inputs)
    assert before.shape == ((2, 2) if name == "clip" else (2, 16, VOCABULARY))
    assert before.isfinite().all()
    assert before.std() > 0.1
    for value in _last_block(model):
        value.data *= 0.5
    assert (_logits(model, inputs) - before).abs().max() > 0.01


def test_equal_seeds_give_equal_weights() -> None:
    first, second, other = (tiny_model(FAMILIES["mixtral"], seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.skipif(
    not transformers.__version__.startswith(TABLE_VERSION), reason=f"the table lists transformers {TABLE_VERSION}"
)
def test_every_causal_model_of_the_library_has_a_row_or_a_reason() -> None:
    assert set(FAMILIES) - {"clip"} | set(EXCLUDED) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(FAMILIES) & set(EXCLUDED)
