"""Laws of the registries and of what a recipe may ask of them."""

from dataclasses import FrozenInstanceError, fields

import pytest

from prunus.allocations import ALLOCATIONS, OWL, Uniform
from prunus.errors import RecipeError
from prunus.methods import ELEMENTWISE, METHODS
from prunus.methods.catalogue import rows
from prunus.methods.compose import compose
from prunus.metrics import METRICS, OBS, RIA, Wanda
from prunus.patterns import NM, Unstructured
from prunus.statistics import InputNorm
from prunus.updates import UPDATES, Keep, OBSSweep

TABLES = {"metric": METRICS, "update": UPDATES, "allocation": ALLOCATIONS, "method": METHODS}
PARTS = [(kind, name) for kind, table in TABLES.items() for name in table]


@pytest.mark.parametrize("kind,name", PARTS)
def test_a_part_is_a_frozen_value_with_a_docstring(kind, name):
    part = TABLES[kind][name]
    assert part == TABLES[kind][name] and hash(part) == hash(TABLES[kind][name])
    assert len(type(part).__doc__) > 30
    assert isinstance(part.paper, str)
    assert isinstance(part.needs, frozenset)
    for item in fields(part):
        with pytest.raises(FrozenInstanceError):
            setattr(part, item.name, None)


@pytest.mark.parametrize("kind,name", [part for part in PARTS if part[0] != "method"])
def test_every_setting_is_documented(kind, name):
    part = TABLES[kind][name]
    for item in fields(part):
        assert f"{item.name}:" in type(part).__doc__, f"{name}.{item.name}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_composes_to_itself(name):
    method, allocation = compose(name)
    assert method == METHODS[name]
    assert allocation == Uniform()


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_everything_composes_with_everything(name, metric, update, pattern, allocation):
    method, share = compose(name, metric=metric, update=update, pattern=pattern, allocation=allocation)
    assert (method.metric, method.update, share) == (METRICS[metric], UPDATES[update], ALLOCATIONS[allocation])
    assert method.pattern == (NM(2, 4) if pattern == "2:4" else METHODS[name].pattern)


def test_settings_reach_their_part_as_their_type():
    method, allocation = compose(
        "sparsegpt",
        allocation="owl",
        settings={"update.block": "64", "update.damp": 0.05, "pattern.group": "row", "allocation.span": "0.1"},
    )
    assert method.update == OBSSweep(block=64, damp=0.05)
    assert isinstance(method.update.block, int)
    assert method.pattern == Unstructured("row")
    assert allocation == OWL(span=0.1)
    assert compose("ria", settings={"metric.power": 1})[0].metric == RIA(power=1.0)


def test_a_setting_that_metric_and_update_share_is_set_for_both_unless_both_are_given():
    assert compose("sparsegpt", settings={"update.damp": 0.1})[0].metric == OBS(damp=0.1)
    assert compose("sparsegpt", settings={"metric.damp": 0.1})[0].update == OBSSweep(damp=0.1)
    both, _ = compose("sparsegpt", settings={"metric.damp": 0.1, "update.damp": 0.2})
    assert (both.metric, both.update) == (OBS(damp=0.1), OBSSweep(damp=0.2))


def test_other_parts_in_a_method_lose_its_paper():
    method, _ = compose("wanda", update="obs")
    assert (method.metric, method.update, method.paper) == (Wanda(), OBSSweep(), "")
    assert compose("wanda", pattern="2:4")[0].paper == Wanda.paper
    assert compose("wanda")[0].update == Keep()


def test_reference_reaches_every_part_that_knows_it():
    method, allocation = compose("sparsegpt", allocation="owl", compat="reference")
    assert method.pattern == Unstructured("matrix", "reference")
    assert method.update == OBSSweep(compat="reference")
    assert allocation == OWL(compat="reference")
    kept, _ = compose("sparsegpt", compat="reference", settings={"pattern.compat": "exact"})
    assert kept.pattern == Unstructured("matrix")


def test_reference_that_would_change_nothing_is_refused():
    with pytest.raises(RecipeError, match="changes nothing"):
        compose("wanda", pattern="2:4", compat="reference")


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"method": "wnada"}, "no method 'wnada'. Did you mean 'wanda'"),
        ({"metric": "magnitud"}, "no metric 'magnitud'. Did you mean 'magnitude'"),
        ({"update": "obss"}, "no update 'obss'. Did you mean 'obs'"),
        ({"allocation": "unifrom"}, "no allocation 'unifrom'. Did you mean 'uniform'"),
        ({"pattern": "4:2"}, "2:4"),
        ({"settings": {"damp": 0.1}}, "axis.field"),
        ({"settings": {"updat.damp": 0.1}}, "Did you mean 'update'"),
        ({"settings": {"update.dampp": 0.1}}, "no setting 'dampp'. Did you mean 'damp'"),
        ({"settings": {"metric.power": 0.1}}, "OBS has no setting 'power'"),
        ({"settings": {"update.block": "wide"}}, "update.block = 'wide'.*integer"),
        ({"settings": {"update.block": 6.5}}, "update.block = 6.5"),
        ({"settings": {"update.damp": 2}}, "update.damp is 2"),
        ({"settings": {"pattern.group": "rows"}}, "pattern.group = 'rows'.*'row' or 'matrix'"),
        ({"pattern": "2:4", "settings": {"pattern.group": "row"}}, "NM has no setting 'group'"),
        ({"allocation": "uniform", "settings": {"allocation.span": 1}}, "Uniform has no setting.*no settings"),
    ],
)
def test_what_cannot_be_composed_says_why(arguments, words):
    with pytest.raises(RecipeError, match=words):
        compose(**{"method": "sparsegpt", **arguments})


def test_a_power_below_zero_is_refused():
    with pytest.raises(RecipeError, match=r"metric.power"):
        RIA(power=-1)


def test_the_catalogue_lists_every_part_once():
    listed = {(row["kind"], row["name"]) for row in rows()}
    assert set(PARTS) <= listed
    assert {("pattern", "unstructured"), ("pattern", "N:M")} <= listed
    assert len(rows()) == len(listed)
    wanda = next(row for row in rows() if row["name"] == "wanda" and row["kind"] == "method")
    assert wanda["needs"] == [InputNorm.__name__]
    assert "2306.11695" in wanda["paper"]
    sweep = next(row for row in rows() if row["name"] == "obs" and row["kind"] == "update")
    assert sweep["defaults"] == {"block": 128, "damp": 0.01, "compat": "exact", "bits": 0}
