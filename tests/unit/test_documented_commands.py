"""Every command of README and docs is run, or at least parsed by the real command line, or stands here with a reason.

executed   what takes seconds, on the tiny model and a stack of real processes
parsed     the others of ours: commands, flags and values exist (nothing is invoked); of Ray, commands and flags
external   other programs' commands, each with the reason why no test runs it
"""

from __future__ import annotations

import json
import re
import sys

import pytest
import typer
from ray.scripts.scripts import cli as ray_command_line

from pdspec.cli import app
from pdspec.config import HttpConfig, RouterConfig, WorkerConfig
from pdspec.errors import PdspecError
from pdspec.study.stack import Stack
from tests.documented import PAGES, ROOT, Shown, shown_commands

COMMANDS = list(shown_commands())
SETTINGS = {"prefill_worker": WorkerConfig, "decode_worker": WorkerConfig, "router": RouterConfig,
            "router.relay": RouterConfig, "pdspec.gateway": HttpConfig}  # fmt: skip
EXTERNAL = {
    "python -m venv": "environments of other engines: gigabytes; bench peers says what it lacks",
    "PEERS/llama/bin/pip install": "the same",
    "PEERS/vllm/bin/pip install": "the same",
    "openssl rand -hex 32": "openssl's own: any 16 characters do",
    "curl http://127.0.0.1:8000/v1/chat/completions": "tests/contract/test_http.py sends it to a real front",
}
WORDS = {"…": "x", "HOST:PORT": "127.0.0.1:1", "COMMAND": "up"}  # what a page leaves to its reader
CONFIG = {"model": "tiny", "heads": {"eagle3": "random:0"}, "cache_tokens": 4096, "threads": 1, "chunk": 16}
# Commands of pages that a test executes: as they stand, but for the endpoint of its own stack.
EXECUTED = (
    "pdspec models", "pdspec drafters", "pdspec plan", "pdspec plan --hardware h100-80gb --model llama-3.1-8b",
    "pdspec plan --prompt 512 --output 4096 --batch 16", "pdspec plan sweep --help", "pdspec up --help",
    'pdspec generate "Why is the sky blue?"', "pdspec top --once --json", "pdspec doctor --endpoint HOST:PORT",
)


def described(command: Shown) -> str:
    return str(command)


def resolved(words: list[str]):
    """(click command, its name, what is left of ``words``) after the names of groups. Raises KeyError."""
    command, name = typer.main.get_command(app.build_app()), "pdspec"
    while words and (inner := getattr(command, "commands", {})):
        if words[0].startswith("-") and command.invoke_without_command:
            break
        name, *words = words
        command = inner[name]
    return command, name, words


def parse(words: list[str]) -> None:
    """By the command itself, without running it. Raises click's errors, and SystemExit or Exit for --help."""
    command, name, rest = resolved(words)
    if command.callback is None and not getattr(command, "invoke_without_command", False):
        return  # a group alone, as in a sentence
    with command.make_context(name, rest):
        pass


def external(command: Shown) -> bool:
    return any(command.text.startswith(known) for known in EXTERNAL)


@pytest.mark.parametrize("command", COMMANDS, ids=described)
def test_every_command_shown_exists(command):
    words = [WORDS.get(word, word) for word in command.words]
    if external(command):
        return
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets
    elif words[:2] == ["python", "-m"]:
        check_module(words[2:])
    elif words[0] == "ray":
        check_ray(words[1:])
    else:
        assert words[0] == "pdspec", f"{command} is in no class: parse it, run it, or say in EXTERNAL why not"
        if command.whole or any(word.startswith("-") for word in words[1:]):
            try:
                parse(words[1:])
            except typer.Exit as ended:
                assert ended.exit_code == 0 and "--help" in words
        else:
            resolved(words[1:])


def check_ray(words: list[str]) -> None:
    """Ray's own command line has the command and its flags."""
    name, *rest = words
    command = ray_command_line.commands[name]
    known = {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}
    assert {word.split("=")[0] for word in rest if word.startswith("-")} <= known, f"ray {name} has no such flag"


def check_module(words: list[str]) -> None:
    module, *flags = words
    if module == "pdspec.cli.reference":
        return
    SETTINGS[module].from_args(flags, prog=module)


def test_the_list_of_other_programs_has_nothing_that_no_page_shows():
    for known in EXTERNAL:
        assert any(command.text.startswith(known) for command in COMMANDS), known
    assert {page.name for page in PAGES} >= {"README.md", "operations.md", "adding-a-drafter.md"}
    assert len(COMMANDS) > 80


@pytest.mark.parametrize("wrong", [["up", "--decoders", "3"], ["bench", "decode", "--nods", "8"], ["generate"]])
def test_a_flag_that_does_not_exist_is_found(wrong):
    with pytest.raises(Exception, match=r"No such option|Missing parameter"):
        parse(wrong)


def test_a_command_that_does_not_exist_is_found():
    with pytest.raises(KeyError, match="speed"):
        parse(["bench", "speed"])
    with pytest.raises((SystemExit, PdspecError)):
        check_module(["decode_worker", "--drafterz", "none"])


@pytest.fixture(scope="module")
def endpoint():
    with Stack(WorkerConfig.from_mapping(CONFIG)) as stack:
        yield stack.endpoint


@pytest.mark.parametrize("text", EXECUTED)
def test_commands_that_take_seconds_run(text, endpoint, monkeypatch, capsys):
    if text != "pdspec up --help":
        assert any(command.text.startswith(text) for command in COMMANDS), f"no page shows {text}"
    command = Shown(page="", text=text.replace("HOST:PORT", endpoint), whole=True)
    monkeypatch.setenv("PDSPEC_ENDPOINT", endpoint)
    monkeypatch.setattr(sys, "argv", command.words)
    with pytest.raises(SystemExit) as ended:
        app.main()
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) in ((0, 1) if "doctor" in text else (0,)), err
    assert out.strip() and "Traceback" not in err
    if "--json" in text:
        assert json.loads(out)


def test_the_curl_of_the_http_page_has_fields_that_the_front_takes():
    (curl,) = [command for command in COMMANDS if command.words[0] == "curl"]
    body = json.loads(curl.words[curl.words.index("-d") + 1])
    assert body.keys() == {"model", "messages", "stream"}


@pytest.mark.model
@pytest.mark.parametrize(
    "text", ['pdspec generate "Why is the sky blue?" --local', "pdspec models export --out model.gguf", "pdspec doctor"]
)
def test_commands_on_the_real_model_run_as_they_stand(text, monkeypatch, capsys, tmp_path):
    assert any(command.text.startswith(text) for command in COMMANDS), f"no page shows {text}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", Shown(page="", text=text, whole=True).words)
    with pytest.raises(SystemExit) as ended:
        app.main()
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) in ((0, 1) if "doctor" in text else (0,)), err
    assert (out + err).strip() and "Traceback" not in err
    if "export" in text:
        assert (tmp_path / "model.gguf").stat().st_size > 200_000_000
