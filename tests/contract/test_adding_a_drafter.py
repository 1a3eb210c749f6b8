"""A stranger's path: docs/adding-a-drafter.md, word for word. Its code block is the file, its commands are run."""

from __future__ import annotations

import json
import sys

import pytest

from pdspec.cli import app
from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.study.stack import Stack
from pdspec.types import SamplingParams, UserRequest
from tests.documented import ROOT, code_blocks, shown_commands

PAGE = ROOT / "docs" / "adding-a-drafter.md"
(TOY,) = code_blocks(PAGE, "python")
COMMANDS = [command for command in shown_commands() if command.page == PAGE.name and command.whole]
ALONE = [command for command in COMMANDS if "--plugin" in command.words and command.words[1] != "up"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "bigram.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        app.main()
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) == 0, (words, out[-2000:], err[-2000:])
    return out


def test_the_page_has_the_whole_path():
    path = [" ".join(command.words[1:3]) for command in COMMANDS]
    ask = "generate to be or not to be"
    assert path == ["drafters --plugin", "check drafter", "check lossless", "check parity", ask, "up --plugin", ask]


@pytest.mark.parametrize("command", ALONE, ids=str)
def test_a_command_of_the_page(command, folder, monkeypatch, capsys):
    words = command.words
    if words[1] == "generate":
        assert run(monkeypatch, capsys, words).strip()
        return
    found = json.loads(run(monkeypatch, capsys, [*words, "--json"]))
    if words[1] == "drafters":
        assert "bigram" in [row["name"] for row in found["drafters"]]
    elif words[2] == "drafter":
        assert found["ok"] and set(found["parts"].values()) == {"kept"}
    elif words[2] == "lossless":
        assert found["ok"] and found["families"] == ["bigram"]
        assert {"law", "paths.families", "answers"} <= found["parts"].keys()
        assert list(found["parts"]["answers"]["different"]) == ["bigram chain(4)"]
    else:
        assert found["ok"] and found["mismatched"] == 0 and found["cases"] == 2 * 2 * 2


def test_the_last_two_served_by_prefill_and_decode_workers(folder, monkeypatch, capsys):
    """As ``pdspec up`` starts them but for Ray: separate processes, the file named in their settings."""
    up, ask = COMMANDS[-2:]
    assert up.words[1:] == ["up", "--plugin", "bigram.py", "--drafter", "bigram"]
    config = WorkerConfig(
        model="tiny", plugins=("bigram.py",), drafters=("none", "bigram"), drafter="bigram", cache_tokens=4096,
        threads=1,
    )  # fmt: skip
    with Stack(config) as stack:
        monkeypatch.setenv("PDSPEC_ENDPOINT", stack.endpoint)
        answer = json.loads(run(monkeypatch, capsys, [*ask.words, "--max-tokens", "48"]))
        assert answer["drafter"] == "bigram" and answer["kv_bytes"] > 0 and answer["prefill_worker"]
        with RouterClient(stack.endpoint) as client:
            loop = UserRequest(prompt_ids=(7, 8, 9) * 8, sampling=SamplingParams(max_tokens=24, ignore_eos=True))
            plain = client.generate(UserRequest(prompt_ids=loop.prompt_ids, sampling=loop.sampling, drafter="none"))
            drafted = client.generate(loop)
    assert drafted.token_ids == plain.token_ids and drafted.stats.drafted_tokens > 0
