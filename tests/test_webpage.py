"""The page: what it shows, that nothing in it is markup of others, and that a browser shows it without a complaint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, browser
from prunus.cli import main
from prunus.errors import RecipeError
from prunus.webpage.gather import gather
from prunus.webpage.parts import best_runs, overview, provenance, spoken, tasks
from prunus.webpage.plots import PLOTS
from prunus.webpage.render import svg
from prunus.webpage.write import lead, page, task_note, write_page

pytest.importorskip("matplotlib")

HOSTILE = '<script>alert(1)</script> & "quotes" $x_1$ </style>'


def score(acc: float, change: float | None = None) -> dict[str, Any]:
    one: dict[str, Any] = {"acc": acc, "acc_norm": None, "stderr": 0.02, "acc_norm_stderr": None, "items": 100}
    if change is not None:
        one["versus"] = {
            "difference": change, "low": change - 0.05, "high": change + 0.05, "p": 0.01, "verdict": "worse",
        }  # fmt: skip
    return one


def row(name: str, method: str, sparsity: float, perplexity: float, **others: Any) -> dict[str, Any]:
    blocks = [
        {"name": f"b{i}", "sparsity": sparsity + (0.02 * i if method == "ria" else 0), "error": 0.01 * (i + 1)}
        for i in range(4)
    ]
    recipe = {
        "model": "/somewhere/private/tiny",
        "prune": {"method": method, "sparsity": sparsity, "pattern": "unstructured", "allocation": "uniform"},
    }
    common = {"windows": 4, "length": 64, "text": "wikitext2", "loss_stderr": 0.05}
    return {
        "name": name, "status": "done", "recipe": recipe,
        "prune": {
            "sparsity": {"reached": sparsity}, "blocks": blocks, "size": {"dense_bytes": 10**6, "out_bytes": 10**6},
            "seconds": {"total": 61.0}, "peak_rss_bytes": 5 * 10**8, "warnings": [HOSTILE], "versions": {"torch": "2"},
            "calibration": {"samples": 4, "sha256": "ab"},
        },
        "evaluate": {
            "perplexity": perplexity, "sample": f"Once {HOSTILE}", **common,
            "tasks": {"arc_easy": score(0.4, -0.1)}, "groups": {}, "asked": {"limit": 100, "lm_eval": "0.4"},
            "baseline": {"perplexity": 10.0, "sample": "Once dense.", "tasks": {"arc_easy": score(0.5)}, **common},
        },
        **others,
    }  # fmt: skip


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with two good rows, one that failed and one that collapsed; its names are hostile."""
    folder = tmp_path_factory.mktemp("comparison") / "grid"
    rows = [
        row("wanda-0.5", "wanda", 0.5, 12.0),
        row("wanda-0.7", "wanda", 0.7, 40.0),
        row("ria-0.5", "ria", 0.5, 11.0),
        row("long " + "w" * 80, "wanda", 0.6, 900.0, status="collapsed", why=f"Quality fell {HOSTILE}"),
        {"name": "broken", "status": "failed", "why": "no such model", "recipe": row("", "wanda", 0.5, 1)["recipe"]},
    ]
    for one in rows:
        place = folder / "runs" / one["name"]
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(one))
    bench = {"rows": [{"engine": "hf-fp32", "phase": "decode", "tokens_per_second": 12.3456, "file_bytes": 10**8}]}
    (folder / "runs" / "wanda-0.5" / "bench.json").write_text(json.dumps(bench))
    record = {"format": 1, "rows": [{"name": one["name"]} for one in rows]}
    (folder / "comparison.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def text(comparison: Path) -> str:
    return page(gather([comparison]))


def test_the_page_shows_every_row_every_number_and_every_reason(text: str) -> None:
    for words in ("wanda-0.5", "12.00", "1.20", "no such model", "Quality fell", "0.400", "-10.0", "worse", "12.3"):
        assert words in text, words
    assert "Once dense." in text
    assert "torch 2" in text


def test_nothing_that_came_from_a_file_is_markup(text: str) -> None:
    assert "<script" not in text
    assert text.count("</style>") == text.count("<style")
    assert "&lt;script&gt;alert(1)" in text
    assert "/somewhere/private" not in text


def test_the_page_asks_for_nothing_and_is_small(comparison: Path, tmp_path: Path) -> None:
    done = write_page([comparison], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert done["bytes"] == len(text.encode()) < 2_000_000
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", text)
    assert "default-src 'none'" in text
    for plot in done["plots"]:
        assert Path(plot).read_bytes().startswith(b"\x89PNG")
    assert {Path(plot).stem for plot in done["plots"]} == {"perplexity", "sparsity-by-block", "error-by-block", "tasks"}


def test_no_two_things_on_the_page_have_one_id(text: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_colours_of_plots_are_the_pages_variables(text: str) -> None:
    plots = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--series-1)" in plots
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", plots)) == set()


def test_the_best_is_the_best_among_equals(comparison: Path) -> None:
    runs = gather([comparison])
    assert [run.name for run in best_runs(runs)] == ["ria-0.5"]
    assert "ria-0.5" in lead(runs)
    assert "2 of 5 did not come to an end" in lead(runs)


def test_of_two_models_each_has_its_own_best_and_its_own_dense_row(comparison: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name, method, perplexity in (("wanda-0.5", "wanda", 10.5), ("ria-0.5", "ria", 12.0)):
        one = row(name, method, 0.5, perplexity)
        one["recipe"]["model"] = "/elsewhere/tiny"
        one["evaluate"]["baseline"]["perplexity"] = 5.0
        (other / "runs" / name).mkdir(parents=True)
        (other / "runs" / name / "result.json").write_text(json.dumps(one))
    (other / "comparison.json").write_text(json.dumps({"rows": [{"name": "wanda-0.5"}, {"name": "ria-0.5"}]}))
    runs = gather([comparison, other])
    assert [(run.model, run.name) for run in best_runs(runs)] == [("tiny (1)", "ria-0.5"), ("tiny (2)", "wanda-0.5")]
    shown = page(runs)
    assert len(re.findall(r'<span class="best">', shown)) == 4  # perplexity and ratio of two rows
    assert "dense tiny (1)" in shown and "dense tiny (2)" in shown and "5.00" in shown
    assert "tiny (2): wanda" in shown  # the legend of the plots
    assert "by ria-0.5 on tiny (1)." in lead(runs)


def test_of_two_models_each_task_has_both_dense_scores_and_other_items_are_told(
    comparison: Path, tmp_path: Path
) -> None:
    one = row("wanda-0.5", "wanda", 0.5, 12.0)
    one["recipe"]["model"] = "/elsewhere/other"
    one["evaluate"]["baseline"]["tasks"]["arc_easy"] = score(0.777)
    one["evaluate"]["asked"] = {"limit": 7, "lm_eval": "0.4"}
    (tmp_path / "runs" / "wanda-0.5").mkdir(parents=True)
    (tmp_path / "runs" / "wanda-0.5" / "result.json").write_text(json.dumps(one))
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [{"name": "wanda-0.5"}]}))
    runs = gather([comparison, tmp_path])
    table = tasks(runs)
    assert table.count("dense tiny</td>") == table.count("dense other</td>") == 1 and "0.777" in table
    assert "dense</td>" in tasks(gather([comparison]))
    assert "The first 100 items of each" in task_note(gather([comparison]))
    assert "Different numbers of items" in task_note(runs)
    plot = svg(next(plot for plot in PLOTS if plot.name == "tasks"), runs, narrow=False)
    assert "dense tiny" in plot and "dense other" in plot


def test_of_a_path_in_a_reason_only_the_last_part_is_shown(tmp_path: Path) -> None:
    sentence = 'There is no text "/home/somebody/books/one.txt" (see https://example.org/a/b), 2/3 of org/name'
    assert spoken(sentence) == 'There is no text "one.txt" (see https://example.org/a/b), 2/3 of org/name'
    assert spoken("~/a/b, ../up/c and /d/e/.hidden/f hold") == "b, c and f hold"
    one = row("r", "wanda", 0.5, 12.0, status="collapsed", why="Its work waits in /home/somebody/work.")
    one["recipe"]["evaluate"] = {"text": "~/secret/book.txt", "tasks": ["a", "/home/somebody/t.yaml"]}
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "result.json").write_text(json.dumps(one))
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [{"name": "r"}]}))
    (run,) = gather([tmp_path])
    shown = overview([run]) + provenance(run)
    assert "somebody" not in shown and "secret" not in shown and "book.txt" in shown
    assert shown.count("waits in work.") == 2


def test_a_perplexity_without_bounds_is_drawn_and_written(tmp_path: Path) -> None:
    for name, perplexity in (("good", 12.0), ("endless", 1e308)):
        place = tmp_path / "runs" / name
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(row(name, "wanda", 0.5 if name == "good" else 0.9, perplexity)))
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [{"name": "good"}, {"name": "endless"}]}))
    runs = gather([tmp_path])
    assert "1.0e+308" in overview(runs)
    assert "e+" in svg(PLOTS[0], runs, narrow=False)


def test_what_collapsed_or_ties_is_no_best_and_other_windows_do_not_compare(tmp_path: Path) -> None:
    def best(*rows: dict[str, Any]) -> list[str]:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        for one in rows:
            (place / "runs" / one["name"]).mkdir(parents=True)
            (place / "runs" / one["name"] / "result.json").write_text(json.dumps(one))
        (place / "comparison.json").write_text(json.dumps({"rows": [{"name": one["name"]} for one in rows]}))
        return [run.name for run in best_runs(gather([place]))]

    good, bad = row("good", "wanda", 0.5, 12.0), row("bad", "ria", 0.5, 13.0)
    assert best(good, bad) == ["good"]
    assert best(good, row("same", "ria", 0.5, 12.0)) == []
    assert best(good, row("fell", "ria", 0.5, 11.0, status="collapsed")) == []
    for key, other in (("windows", 9), ("engine", "packed"), ("dtype", "bfloat16"), ("bos", True)):
        bad = row("bad", "ria", 0.5, 13.0)
        bad["evaluate"][key] = other
        assert best(good, bad) == [], key


def test_rows_of_two_engines_have_one_dense_row(tmp_path: Path) -> None:
    rows = [row(f"by {engine}", "ria", 0.5, 12.0) for engine in ("transformers", "packed")]
    for one, engine in zip(rows, ("transformers", "packed"), strict=True):
        one["evaluate"]["engine"] = engine
        place = tmp_path / "runs" / one["name"]
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(one))
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [{"name": one["name"]} for one in rows]}))
    assert page(gather([tmp_path])).count("dense tiny</th>") == 1


def test_failed_stale_and_coming_rows_of_a_comparison_are_shown_as_such(comparison: Path, tmp_path: Path) -> None:
    recipe = row("", "wanda", 0.5, 1)["recipe"]
    for name, key in (("done", "k1"), ("stale", "old")):
        place = tmp_path / "runs" / name
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps({**row(name, "wanda", 0.5, 12.0), "key": key}))
    rows = [{"name": name, "key": "k1", "recipe": recipe} for name in ("done", "stale", "coming")]
    rows.append({"name": "never", "key": "", "recipe": recipe, "failed": "the text is gone"})
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": rows}))
    found = {run.name: (run.status, run.perplexity) for run in gather([tmp_path])}
    assert found == {
        "done": ("done", 12.0),
        "stale": ("open", None),
        "coming": ("open", None),
        "never": ("failed", None),
    }
    shown = page(gather([tmp_path]))
    assert "the text is gone" in shown and "not made yet" in shown and "2 of 4 are still to be made" in shown
    (tmp_path / "runs" / "done" / "result.json").unlink()
    rows.pop()
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(RecipeError, match="no finished row"):
        gather([tmp_path])


def test_a_recovered_folder_is_shown_with_how_it_was_pruned_and_recovered(tmp_path: Path) -> None:
    one = row("", "ria", 0.5, 12.0)
    before = {"recipe": one["recipe"], "result": one["prune"]}
    after = {
        "recipe": {"model": "out", "prune": {"method": "wanda"}, "recover": {"method": "masklora"}},
        "result": {"method": "masklora", "objective": "text", "sparsity": 0.5, "size": {"out_bytes": 10**6}},
        "pruned": before,
    }
    for name, record in (("once", after), ("twice", {**after, "pruned": after}), ("foreign", {**after, "pruned": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prunus.json").write_text(json.dumps(record))
    once, twice, foreign = gather([tmp_path / name for name in ("once", "twice", "foreign")])
    assert (once.model, once.series, once.reached) == ("tiny", "ria + masklora", 0.5)
    assert twice.series == "ria + masklora + masklora"
    assert (foreign.model, foreign.series) == ("out", "? + masklora")
    assert once.blocks and not any("error" in block for block in once.blocks)
    assert "ria + masklora" in page([once])


def test_what_was_cut_off_stays_removed_behind_recoveries(tmp_path: Path) -> None:
    one = row("", "flap", 0.2, 12.0)
    record = {"recipe": one["recipe"], "result": {**one["prune"], "shapes": {}}}
    for zeros in (0.0, 0.0, 0.5):
        result = {"method": "masklora", "sparsity": zeros, "size": {"out_bytes": 10**6}}
        record = {"recipe": {"model": "out", "recover": {}}, "result": result, "pruned": record}
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        (place / "prunus.json").write_text(json.dumps(record))
    found = [run.reached for run in gather(sorted(tmp_path.iterdir()))]
    # Half of the weights of what was left behind the cut is zero at last.
    assert found == pytest.approx([0.2, 0.2, 0.6])


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match=r"neither prunus\.json nor comparison\.json"):
        gather([tmp_path])
    (tmp_path / "comparison.json").write_text('{"rows": [{}]}')
    with pytest.raises(RecipeError, match="did not write"):
        gather([tmp_path])
    (tmp_path / "comparison.json").unlink()
    (tmp_path / "prunus.json").write_text("{")
    assert main(["report", str(tmp_path), "-q"]) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_in_both_widths_and_schemes_without_a_complaint(text: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(text, "utf-8")
    papers = set()
    with browser(tmp_path / "profile") as shown:
        for width in (360, 1200):
            for scheme in ("light", "dark"):
                shown.show(file, width=width, scheme=scheme)
                assert shown.evaluate("document.documentElement.scrollWidth") <= width, (width, scheme)
                assert shown.complaints() == []
                papers.add(shown.evaluate("getComputedStyle(document.body).backgroundColor"))
                visible = (
                    "[...document.querySelectorAll('figure svg')].filter(one => one.getBoundingClientRect().width)"
                )
                assert shown.evaluate(f"{visible}.length") == 4
                assert shown.evaluate(f"Math.min(...{visible}.map(one => one.getBoundingClientRect().height))") > 100
                assert "fell <script>" in shown.evaluate("document.body.innerText")
    assert len(papers) == 2
