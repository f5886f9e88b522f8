"""Laws of sparsities from a file."""

import json

import pytest
from resident import EVEN, UNEVEN, model

from prunus.allocations import Manual
from prunus.errors import RecipeError


def manual(tmp_path, text, survey, name="ratios.yaml"):
    file = tmp_path / name
    file.write_text(text)
    return Manual(str(file)).divide(survey, 0.5)


def test_the_last_glob_that_fits_counts_and_others_get_the_recipe_s_sparsity(tmp_path):
    budget = manual(tmp_path, 'layers.1: 0.25\n"*.m1": 0\n"layers.2.m1": 0.7\n', model(UNEVEN))
    assert list(budget.values()) == [0.5, 0.25, 0.0, 0.5, 0.7, 0.5]


def test_a_manual_file_may_be_json(tmp_path):
    text = json.dumps({"layers.0": 0.125})
    assert manual(tmp_path, text, model(UNEVEN), "ratios.json")["layers.0.m0"] == 0.125


@pytest.mark.parametrize(
    "text,words",
    [
        ("layers.9: 0.5", r"'layers.9' fits no block.*layers"),
        ("layers.1: 1.0", r"in \[0, 1\)"),
        ("layers.1: -0.1", r"in \[0, 1\)"),
        ("layers.1: half", r"in \[0, 1\)"),
        ("layers.1: true", r"in \[0, 1\)"),
        ("layers.1: .nan", r"in \[0, 1\)"),
        ("7: 0.5", "must be a name"),
        ("- a", "must map"),
        ("", "must map"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_manual_file_is_refused(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        manual(tmp_path, text, model(UNEVEN))


def test_a_missing_manual_file_is_refused():
    with pytest.raises(RecipeError, match=r"--set allocation.file="):
        Manual().divide(model(EVEN), 0.5)
    with pytest.raises(RecipeError, match=r"nowhere.yaml cannot be read"):
        Manual("nowhere.yaml").divide(model(EVEN), 0.5)
