"""The trace page: what is recorded adds up, the page is one file, and a real browser plays it where there is one."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from pdspec.engine.local import LocalGenerator
from pdspec.study.viewer.asking import Player, of_prompt, of_scenarios
from pdspec.study.viewer.live import line
from pdspec.study.viewer.page import page
from pdspec.types import GenerateRequest, SamplingParams

TEXT = "to be or not to be or not to be or not </script> to be"


@pytest.fixture(scope="module")
def player():
    found = Player({"model": "tiny", "drafter": "ngram", "drafters": ("none", "ngram"), "threads": 1})
    yield found
    found._generator.resources.close()


@pytest.fixture(scope="module")
def replay(player):
    (asked,) = of_prompt(TEXT, raw=True, temperature=0.0, seed=3)
    return player.play(asked, tree="chain(4)", max_tokens=40, on_step=lambda step: None)


def test_a_recording_is_the_answer_itself_and_its_rows_add_up(player, replay):
    generator: LocalGenerator = player._generator
    ids = player._tokenizer.encode(TEXT, add_special_tokens=True)
    request = GenerateRequest(
        request_id="same", prompt_ids=tuple(ids), drafter="none", sampling=SamplingParams(max_tokens=40, seed=3)
    )
    plain = [token for chunk in generator.generate(request) for token in chunk.token_ids]
    assert replay["tokens"] == len(plain) == 1 + sum(len(step["out"]) for step in replay["steps"])
    rows = replay["prompt_tokens"]
    for step in replay["steps"]:
        assert step["kv_before"] == rows and step["kv_peak"] == rows + 1 + len(step["nodes"])
        rows = step["kv_after"]
        assert rows == step["kv_before"] + len(step["out"]) and len(step["path"]) == len(step["out"]) - 1
        assert len(step["judged"]) == len(step["out"]) == len(step["out_p"])
        for place, node in enumerate(step["path"]):
            assert step["nodes"][node]["p"] == step["out_p"][place]  # greedy: the accepted draft is what was put out
            assert step["judged"][place][0][1] == pytest.approx(step["out_p"][place])  # and the target's best
        assert step["forward_ms"] > 0
    assert replay["drafted"] == sum(len(step["nodes"]) for step in replay["steps"]) > 0
    assert replay["draft_bytes"] == 0 and replay["target_bytes"] > 0


def test_the_page_is_one_file_that_loads_nothing_and_escapes_its_data(replay):
    html = page([replay, {**replay, "title": "</script><b>\u2028"}])
    assert html.count("<script>") == html.count("</script>") == 1
    assert not re.search(r"(src|href)\s*=|url\(|import\s|https?://(?!www\.w3\.org/2000/svg)", html)
    data = re.search(r"const DATA = (.*);\n", html)
    assert data is not None
    first, second = json.loads(data[1])
    assert second["title"] == "</script><b>\u2028" and first == json.loads(json.dumps(replay))


def test_a_line_in_the_terminal_says_what_was_kept_and_rewound(replay):
    missed = next(step for step in replay["steps"] if len(step["path"]) < len(step["nodes"]))
    text = line(1, missed).plain
    assert "✗" in text and f"KV {missed['kv_before']} ↗ {missed['kv_peak']} ↘ {missed['kv_after']}" in text
    assert f"({missed['kv_peak'] - missed['kv_after']} rows back)" in text


def test_two_contrasting_scenarios_are_shipped():
    first, second = of_scenarios()
    assert "def " in first.text and first.temperature == 0.0
    assert "clock" in second.text and second.temperature > 0.0


def test_a_browser_plays_the_life_of_a_rejected_token(tmp_path, replay):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser here")
    path = tmp_path / "out.html"
    path.write_text(page([replay, {**replay, "title": "second"}]), encoding="utf-8")
    errors: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(path.as_uri())
        step = next(i for i, s in enumerate(replay["steps"]) if len(s["path"]) < len(s["nodes"]))
        asked = replay["steps"][step]
        tab.evaluate(f"go({4 * step + 1})")
        assert tab.locator("#text .ghost").count() > 0 and tab.locator("#tree .node").count() == len(asked["nodes"])
        tab.click("#next")
        assert tab.locator("#text .no").count() == 1
        assert tab.locator("#rows").text_content().startswith(f"{asked['kv_peak']} rows")
        tab.click("#next")
        assert tab.locator("#rows").text_content().startswith(f"{asked['kv_after']} rows")
        tab.click("#next")
        assert tab.locator("#text .no").count() == 0 and "replace" in tab.locator("#phase").text_content()
        tab.hover("#tree .node >> nth=0")
        assert "survival" in tab.locator("#tip").text_content()
        tab.select_option("#speed", "250")
        tab.click("#life")
        tab.wait_for_function("at % 4 === 0 && at > 0 && timer === null", timeout=20_000)
        tab.select_option("#which", "1")
        assert "prefill" in tab.locator("#phase").text_content()
        tab.evaluate("go(1e9)")
        whole = tab.locator("#text").text_content()
        out = replay["first"] + "".join(text for one in replay["steps"] for text in one["out"])
        assert whole == replay["prompt"] + out
        browser.close()
    assert errors == []
