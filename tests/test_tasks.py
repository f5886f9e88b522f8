"""Benchmark tasks: lm-eval's own numbers, items from plain files, refusals with the line, and what is noise."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.cli import main
from prunus.errors import CalibrationError, RecipeError
from prunus.evaluation.paired import mcnemar, resampled_means, verdict, versus, versus_group
from prunus.evaluation.perplexity import known_dense
from prunus.evaluation.task_data import fingerprint, read_rows
from prunus.evaluation.tasks import Suite, _defined, _manager, _scores, summary
from prunus.recipe import EvaluatePart
from prunus.recipe_options import EVALUATE_PLACES, from_options
from prunus.runtime.native import available

MODEL = Path(__file__).parent / "assets" / "stories260k"
SHARED = Path(__file__).parents[2] / "shared" / "data"  # beside the checkout where there is one
WORDS = ["cat", "dog", "bird", "fish", "frog"]


def arc(number: int) -> dict[str, Any]:
    """One item in ARC's form; the places of the right answers differ."""
    texts = [f"The {WORDS[(number + i) % 5]} went to the {WORDS[(number * i + 1) % 5]}." for i in range(3 + number % 2)]
    labels = list("ABCD")[: len(texts)]
    answer = labels[number % len(texts)]
    return {"question": f"Where is it, {number}?", "choices": {"text": texts, "label": labels}, "answerKey": answer}


def winogrande(number: int) -> dict[str, Any]:
    sentence = f"Tim saw {WORDS[number % 5]} and Lily saw it because _ was happy on day {number}."
    return {"sentence": sentence, "option1": "Tim", "option2": "Lily", "answer": str(1 + number % 2)}


def boolq(number: int) -> dict[str, Any]:
    return {"question": f"is it {number}", "passage": f"There was a {WORDS[number % 5]}.", "answer": number % 3 == 0}


ITEMS = {"arc_easy.test": arc, "winogrande": winogrande, "boolq.validation": boolq}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine items of three tasks, one file packed."""
    place = tmp_path_factory.mktemp("tasks")
    for name, make in ITEMS.items():
        text = "".join(json.dumps(make(number)) + "\n" for number in range(9))
        if name.startswith("arc"):
            (place / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (place / f"{name}.jsonl").write_text(text, "utf-8")
    return place


# --- noise ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_lopsided(lost: int, gained: int) -> None:
    total = lost + gained
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=min(total, 12))] if total <= 12 else None
    if tosses is None:
        assert mcnemar(lost, gained) == pytest.approx(mcnemar(gained, lost))
        return
    distance = abs(lost - total / 2)
    assert mcnemar(lost, gained) == pytest.approx(np.mean([abs(heads - total / 2) >= distance for heads in tosses]))


@settings(max_examples=20)
@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=5, max_size=60))
def test_resampled_means_have_the_mean_and_the_spread_of_the_sample_mean(changes: list[float]) -> None:
    means = resampled_means(changes, np.random.default_rng(0))
    spread = float(np.std(changes)) / len(changes) ** 0.5
    assert len(means) == 10_000
    assert float(means.mean()) == pytest.approx(float(np.mean(changes)), abs=5 * spread / 100 + 1e-12)
    assert float(means.std()) == pytest.approx(spread, rel=0.06, abs=1e-12)


def test_a_clear_loss_is_worse_a_small_one_is_noise_and_both_have_their_interval() -> None:
    dense = [1.0] * 60 + [0.0] * 40
    worse = versus([0.0] * 20 + [1.0] * 40 + [0.0] * 40, dense)
    assert (worse["verdict"], worse["lost"], worse["gained"]) == ("worse", 20, 0)
    assert worse["difference"] == pytest.approx(-0.2)
    assert worse["low"] < -0.2 < worse["high"] < 0
    noise = versus([0.0] * 4 + [1.0] * 56 + [1.0] * 2 + [0.0] * 38, dense)
    assert noise["verdict"] == "no worse within the noise"
    assert noise["low"] < 0 < noise["high"]
    same = versus(dense, dense)
    assert (same["verdict"], same["p"], same["difference"]) == ("the same on average", 1.0, 0.0)
    lower = versus([2.0 + 0.01 * i for i in range(30)], [1.0] * 30, higher_is_better=False)
    assert (lower["verdict"], lower["test"]) == ("worse", "bootstrap")
    assert verdict(0.1, 0.01) == "better"


def test_a_group_counts_every_task_alike() -> None:
    few, many = ([0.0] * 4, [1.0] * 4), ([1.0] * 400, [1.0] * 400)
    found = versus_group({"few": few, "many": many})
    assert found["difference"] == pytest.approx(-0.5)
    assert found["low"] == found["high"] == pytest.approx(-0.5)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 is no JSON object but list"),
        ('{"a": 1}', "line 3 differs from line 1: .*line 1 has b"),
        ('{"a": 1, "b": {"c": 2}, "d": 0}', "line 3 has d"),
        ('{"a": "1", "b": {"c": 2}}', "line 3: a is text, and a number on line 1"),
        ('{"a": 1, "b": {"e": 2}}', r"line 3 differs from line 1: .*b\.c"),
        ('{"a": null, "b": {"c": 2}}', "line 3: a is null"),
    ],
)
def test_a_malformed_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(f'{{"a": 1, "b": {{"c": 2}}}}\n\n{line}\n')
    with pytest.raises(CalibrationError, match=words):
        read_rows(file, "t")


@pytest.mark.parametrize("item", [{"question": "q"}, {"question": "q", "answer": "false"}])
def test_an_item_without_an_answer_gets_no_label(item: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "boolq.jsonl"
    file.write_text(json.dumps(item) + "\n")
    with pytest.raises(CalibrationError, match="line 1 has neither a label"):
        read_rows(file, "boolq")
    file.write_text(json.dumps(item | {"answer": False}) + "\n")
    assert read_rows(file, "boolq").rows[0]["label"] == 0


def test_pairs_are_of_the_filter_whose_number_is_shown() -> None:
    class Task:
        def higher_is_better(self) -> dict[str, bool]:
            return {"acc": True}

    samples = [
        {"doc_id": item, "filter": name, "acc": float(item % 2 if name == "strict" else 1)}
        for name in ("strict", "flexible")
        for item in range(4)
    ]
    found = _scores(Task(), {"acc,strict": 0.5, "acc,flexible": 1.0}, samples)
    assert (found["acc"], found["scores"], found["items"]) == (0.5, [0.0, 1.0, 0.0, 1.0], 4)


def test_the_dense_model_of_a_recovered_folder_is_the_one_that_was_pruned(tmp_path: Path) -> None:
    record = {"recipe": {"model": "pruned-folder"}, "pruned": {"recipe": {"model": str(MODEL)}}}
    (tmp_path / "prunus.json").write_text(json.dumps(record))
    assert known_dense(tmp_path, []) == str(MODEL)
    (tmp_path / "prunus.json").write_text("{}")
    notes: list[str] = []
    assert known_dense(tmp_path, notes) is None and "--baseline" in notes[0]


def test_lines_end_where_the_file_says_and_packed_files_are_the_same(tmp_path: Path) -> None:
    text = json.dumps({"a": "one\u2028two"}, ensure_ascii=False) + "\n\n" + json.dumps({"a": "x"}) + "\n"
    (tmp_path / "t.jsonl").write_text(text, "utf-8")
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = read_rows(tmp_path / "t.jsonl", "t"), read_rows(tmp_path / "t.jsonl.gz", "t")
    assert plain.lines == [1, 3]
    assert (plain.rows, plain.sha256) == (packed.rows, packed.sha256)
    (tmp_path / "t.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_rows(tmp_path / "t.jsonl.gz", "t")


def test_changed_items_are_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    assert set(fingerprint(str(folder), ["owl7"])) == {
        "arc_easy.test.jsonl.gz",
        "boolq.validation.jsonl",
        "winogrande.jsonl",
    }
    assert fingerprint(str(folder), ["arc_easy"]) != fingerprint(str(folder), ["boolq"])
    assert fingerprint(None, ["owl7"]) == {}


def test_a_recipe_takes_tasks_as_a_list_or_with_commas() -> None:
    assert (
        EvaluatePart.model_validate({"tasks": "a, b,"}).tasks
        == EvaluatePart.model_validate({"tasks": ["a", "b"]}).tasks
    )
    assert "max_ppl_ratio" not in EvaluatePart().asked()


# --- lm-eval -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(folder: Path) -> dict[str, Any]:
    """stories260k on seven items of three tasks, beside itself."""
    pytest.importorskip("lm_eval")
    from prunus.evaluation.perplexity import evaluate

    tasks = ["arc_easy", "winogrande", "boolq"]
    return evaluate(MODEL, baseline=MODEL, text="none", tasks=tasks, task_data=folder, limit=7)


def own_task(name: str, folder: Path, tmp_path: Path) -> str:
    """lm-eval's definition of the task, reading our file by lm-eval's own means and nothing of ours."""
    import lm_eval.tasks

    places = {"arc_easy": "arc/arc_easy.yaml", "winogrande": "winogrande/default.yaml"}
    split, file = {"arc_easy": ("test", "arc_easy.test.jsonl.gz"), "winogrande": ("validation", "winogrande.jsonl")}[
        name
    ]
    (tmp_path / f"{name}.yaml").write_text(
        f"include: {Path(str(lm_eval.tasks.__file__)).parent / places[name]}\ntask: own_{name}\ndataset_path: json\n"
        f"dataset_name: null\ntraining_split: null\nvalidation_split: null\ntest_split: null\n{split}_split: {split}\n"
        f"dataset_kwargs: {{data_files: {{{split}: {folder / file}}}}}\n"
    )
    return f"own_{name}"


@pytest.mark.filterwarnings("ignore")
def test_the_numbers_are_those_of_lm_eval_itself(asked: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    import lm_eval

    names = ["arc_easy", "winogrande"]
    own = [own_task(name, folder, tmp_path) for name in names]
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={MODEL},dtype=float32", tasks=own, limit=7, device="cpu",
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(tmp_path)),
    )["results"]  # fmt: skip
    for name in names:
        ours, there = asked["tasks"][name], theirs[f"own_{name}"]
        assert (ours["acc"], ours["stderr"]) == (there["acc,none"], there["acc_stderr,none"])
        assert ours["acc_norm"] == there.get("acc_norm,none")
        assert ours["items"] == there.get("sample_len", 7) == 7


def test_a_model_beside_itself_is_the_same_and_the_baseline_has_every_score(asked: dict[str, Any]) -> None:
    for name, one in asked["tasks"].items():
        assert one["versus"]["verdict"] == "the same on average"
        assert one["acc"] == asked["baseline"]["tasks"][name]["acc"]
    assert asked["asked"]["files"]["arc_easy"]["sha256"]
    assert "perplexity" not in asked
    assert json.loads(json.dumps(asked)) == asked


@pytest.mark.skipif(available() is None, reason="no compiled kernels here")
def test_the_packed_engine_answers_what_the_model_does(asked: dict[str, Any], folder: Path) -> None:
    from prunus.evaluation.perplexity import evaluate
    from prunus.evaluation_text import evaluate_text

    found = evaluate(
        MODEL, engine="packed", baseline="none", text="none", tasks=["arc_easy"], task_data=folder, limit=7
    )
    ours, theirs = found["tasks"]["arc_easy"], asked["tasks"]["arc_easy"]
    assert [ours[key] for key in ("acc", "acc_norm", "items")] == [theirs[key] for key in ("acc", "acc_norm", "items")]
    assert "stories260k by the packed engine" in evaluate_text(found)
    assert "engine" not in evaluate_text(asked)


def test_the_text_shows_both_and_says_what_is_noise(asked: dict[str, Any]) -> None:
    from prunus.evaluation_text import evaluate_text

    text = evaluate_text(asked)
    for words in ("winogrande", "dense", "the same on average", "first 7 items", "McNemar"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.skipif(not (SHARED / "lm_eval").is_dir(), reason="the shared data are not here")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_seven_tasks_of_owl_are_lm_evals_on_the_published_items() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from prunus.evaluation.perplexity import evaluate
    from prunus.evaluation.task_data import GROUPS

    ours = evaluate(MODEL, text="none", tasks=["owl7"], task_data=SHARED / "tasks", limit=6, baseline="none")
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={MODEL},dtype=float32", limit=6, device="cpu",
        tasks=[f"local_{name}" for name in GROUPS["owl7"]],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(SHARED / "lm_eval")),
    )["results"]  # fmt: skip
    accuracies = []
    for name in GROUPS["owl7"]:
        there = theirs[f"local_{name}"]
        assert ours["tasks"][name]["acc"] == there["acc,none"], name
        assert ours["tasks"][name]["acc_norm"] == there.get("acc_norm,none"), name
        accuracies.append(there["acc,none"])
    assert ours["groups"]["owl7"]["acc"] == pytest.approx(sum(accuracies) / 7, abs=1e-15)


def test_names_are_found_however_a_definition_writes_them(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.yaml").write_text('"task": "quoted"\n"tag":\n- listed\n- also.listed\noutput: x\n')
    (tmp_path / "one" / "b.yaml").write_text("group: whole\ntask:\n  - quoted\n  - plain # comment\n")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "c.yaml").write_text("task: plain  # a comment\ntag: across\n")
    (tmp_path / "two" / "_default_yaml").write_text("tag: [flow, across]\n")
    single, several = _defined(SimpleNamespace(folder=tmp_path))
    assert single == {"quoted": tmp_path / "one", "plain": tmp_path / "two"}
    assert {"listed", "also.listed", "whole", "across", "flow"} <= several and "plain" not in several


def test_a_tag_is_looked_up_in_all_definitions_and_single_tasks_in_their_own_folders() -> None:
    class Manager:
        def __init__(self, **how: Any) -> None:
            self.how, self.task_index = how, {"glue": 0, "cola": 0}

    harness, single = SimpleNamespace(TaskManager=Manager), {"cola": Path("a"), "rte": Path("b")}
    assert _manager(harness, ["rte", "cola"], single).how == {"include_defaults": False, "include_path": ["a", "b"]}
    assert _manager(harness, ["cola", "glue"], single).how == {}
    with pytest.raises(RecipeError, match=r"no task 'glu'.* Did you mean 'glue'"):
        _manager(harness, ["glu"], single)


def test_every_task_of_lm_eval_is_known_by_its_name() -> None:
    harness = pytest.importorskip("prunus.evaluation.tasks")._harness()
    single, several = _defined(harness)
    assert {"mmlu_abstract_algebra", "cola", "arc_easy"} <= single.keys()
    assert {"glue", "mmlu", "super-glue-lm-eval-v1"} <= several and "glue" not in single


def test_the_error_of_a_group_is_known_only_where_that_of_its_tasks_is() -> None:
    suite = Suite({}, {"both": ("a", "b")}, {}, 1, 1)
    one = {"acc": 0.5, "stderr": 0.3, "higher_is_better": True, "scores": [0.5]}
    found = summary(suite, {"a": one, "b": {**one, "stderr": 0.4}})
    assert found["groups"]["both"]["stderr"] == pytest.approx(0.25)
    assert summary(suite, {"a": one, "b": {**one, "stderr": None}})["groups"]["both"]["stderr"] is None


def test_options_of_tasks_or_of_a_text_are_refused_where_there_is_none() -> None:
    for wrong, words in (
        ({"batch": 4}, "batch is about benchmark tasks"),
        ({"limit": 4}, "limit is about benchmark tasks"),
        ({"text": "none"}, "nothing to measure"),
        ({"text": "none", "tasks": ["a"], "windows": 3}, "leave windows out"),
    ):
        with pytest.raises(RecipeError, match=words):
            from_options({"model": "m", **wrong}, places=EVALUATE_PLACES)


def test_items_that_the_hub_does_not_give_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network here")

    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert main(["evaluate", str(MODEL), "--text", "none", "--tasks", "arc_easy", "-q"]) == 2
    said = capsys.readouterr().err
    assert "The items of arc_easy cannot be had from the hub (no network here)" in said and "--task-data" in said


# --- refusals ------------------------------------------------------------------------------------------------------


def refused(folder: Path, tasks: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("lm_eval")
    words = ["evaluate", str(MODEL), "--text", "none", "--tasks", tasks, "--task-data", str(folder), "-q"]
    assert main(words) == 2
    return capsys.readouterr().err


def test_an_unknown_task_gets_the_nearest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'arc_easy'" in refused(folder, "arc_eazy", capsys)


def test_missing_items_are_named_with_what_is_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no piqa.validation.jsonl" in refused(folder, "piqa", capsys)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "boolq.jsonl").write_text("{}")
    assert f"Did you mean {tmp_path / 'data'}" in refused(tmp_path, "boolq", capsys)
    (tmp_path / "arc_easy.validation.jsonl").write_text(json.dumps(arc(1)))
    assert "arc_easy.validation.jsonl is another split" in refused(tmp_path, "arc_easy", capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answerKey": "Z"}, "line 2 does not fit arc_easy"),
        ({"choices": {"text": [], "label": ["A"]}}, "line 2 does not fit arc_easy"),
    ],
)
def test_an_item_that_cannot_be_asked_is_named_by_its_line(
    change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [arc(0), {**arc(1), **change}, arc(2)]
    (tmp_path / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert words in refused(tmp_path, "arc_easy", capsys)


def test_no_tasks_and_no_text_is_nothing_to_do() -> None:
    from prunus.evaluation.perplexity import evaluate

    with pytest.raises(RecipeError, match="nothing to measure"):
        evaluate(MODEL, text="none")
