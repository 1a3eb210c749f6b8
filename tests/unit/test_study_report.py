"""The report: one page that loads nothing, whose pictures say what rows they were made from; a browser shows it."""

from __future__ import annotations

import re
import shutil

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from pdspec.errors import ConfigError
from pdspec.study.cells import tables
from pdspec.study.cells.drawing import Series
from pdspec.study.cells.figures import front
from pdspec.study.cells.grid import StudyConfig, cells
from pdspec.study.cells.report import report, values
from pdspec.study.cells.store import Store

NAME = "What </title><script>alert(1)</script> pays"
STUDY = StudyConfig.from_mapping({
    "name": NAME, "models": ["tiny"], "drafters": ["none", "ngram chain(2)"], "loads": ["closed 1", "closed 2"],
    "workload": {"requests": 3}, "worker": {"threads": 1}, "price_per_hour": 1.0,
})  # fmt: skip


def row(index: int, *, drafts: bool, pace_ms: float) -> dict:
    """20 verifications after the first token, of two tokens each where there are drafts."""
    pieces = [1] + [1 + drafts] * 20
    return {
        "index": index, "error": "", "asked_s": 0.1 * index, "ttft_ms": 50.0, "total_ms": 50.0 + 20 * pace_ms,
        "piece_ms": [50.0 + n * pace_ms for n in range(21)], "piece_tokens": pieces, "output_tokens": sum(pieces),
        "token_ids": list(range(sum(pieces))), "verifications": 20, "drafted_tokens": 40 * drafts,
        "accepted_tokens": 20 * drafts, "accepted_per_position": [20, 0][: 2 * drafts],
        "reached_per_position": [20, 20][: 2 * drafts], "kv_bytes": 0, "draft_kv_bytes": 0,
        "transfer_exposed_ms": 0.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    store, grid = Store(out), cells(STUDY)
    with store.held():
        store.describe(STUDY, grid)
        for place, cell in enumerate(grid[:-1]):  # one is not measured yet
            with store.writing(cell) as write:
                for index in range(3):
                    write(row(index, drafts=cell.drafter != "none", pace_ms=10.0 + place))
        tables.write(store, STUDY, grid)
    return out


@pytest.fixture(scope="module")
def made(folder):
    return report(folder)


def test_every_picture_names_rows_and_columns_that_exist(folder, made):
    names = [one["name"] for one in made["figures"]]
    assert names == ["pareto", "cdf", "timeline", "acceptance", "positions", "topologies"]
    page = (folder / "report.html").read_text()
    for one in made["figures"]:
        found = tables.read(folder / one["table"])
        assert one["cells"] and set(one["cells"]) <= {row["cell"] for row in found}
        assert set(one["columns"]) <= set(found[0])
        said = f"Made from {one['table']}, columns {', '.join(one['columns'])}; cells {', '.join(one['cells'])}."
        assert said in page and said in (folder / "report.md").read_text()
        assert (folder / "figures" / f"{one['name']}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_loads_nothing_and_escapes_what_people_wrote(folder, made):
    page = (folder / "report.html").read_text()
    assert not re.search(r"<script|<link|<image|<img|url\((?!#)|@import|(?:src|href)=\"(?!#)", page)
    assert "7 of 8 cells" in page and "What &lt;/title&gt;" in page
    assert "best colocated 0P1D ngram" in page and page.count("<svg") == 6
    names = re.findall(r' id="([^"]*)"', page)
    assert len(names) == len(set(names)) > 6
    head = re.search(r"<tbody>\n<tr>(.*?)</tr>", page)
    assert head is not None
    shown = re.findall(r"<td>(.*?)</td>", head[1])
    assert shown[9] == shown[12] == shown[15] == "–", "no P99 of 3 requests and 60 gaps"
    assert len(shown) == page.count("<th>") and "not reported" in shown and page.count("<th>joules per token") == 1


def test_tables_of_an_older_version_are_still_shown(folder):
    rows = tables.read(folder / "cells.parquet")
    since = ("turns", "prompt_tokens", "draft_share", "busy_share", "joules_per_output_token", "cached_share")
    old = {key: value for key, value in rows[0].items() if not key.startswith((*since, "ttft_ms_", "cached_"))}
    old |= {key: rows[0][key] for key in ("ttft_ms_p50", "ttft_ms_p90", "ttft_ms_p99")}
    assert values(old)[:22] == values(rows[0])[:22] and values(old)[26] == "not reported"


def test_what_is_equal_in_all_cells_is_not_said(folder):
    rows = tables.read(folder / "cells.parquet")
    assert [Series(rows).label(row) for row in rows[:2]] == ["0P1D none", "0P1D ngram"]
    assert len({Series(rows).look(row)["color"] for row in rows}) == 2


def test_a_front_holds_what_nothing_beats():
    assert front([(1, 5), (2, 5), (3, 9), (2, 7), (4, 9), (1, 2)]) == [(1, 2), (2, 5), (4, 9)]


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no study"):
        report(tmp_path)


def test_a_browser_shows_it(folder, made):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser here")
    errors: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1100, "height": 900})
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda asked: None if asked.url.startswith("file:") else errors.append(asked.url))
        tab.goto((folder / "report.html").as_uri())
        assert tab.title() == NAME and tab.locator("h1").text_content() == NAME
        for one in made["figures"]:
            box = tab.locator(f"#{one['name']} svg").bounding_box()
            assert box["width"] > 600 and box["height"] > 200
            assert tab.locator(f"#{one['name']} svg path").count() > 10
            assert "Made from" in tab.locator(f"#{one['name']} figcaption").inner_text()
        assert "output tokens per second" in tab.locator("#pareto svg").text_content()
        assert tab.locator("tbody tr").count() == 7
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1100, "the page itself does not scroll sideways"
        assert len(tab.screenshot(full_page=True)) > 50_000
        browser.close()
    assert errors == []
