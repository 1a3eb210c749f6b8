"""Conversations, long prompts, and what a cell took as a whole: clocks of workers, joules of the machine."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError, Overloaded
from pdspec.model.tokenizer import load_tokenizer
from pdspec.prompts import Prompt, load_prompts
from pdspec.study.cells import clocks, energy
from pdspec.study.cells.chats import FOLLOW_UPS, follow_up, long_texts
from pdspec.study.cells.client import Heard, send
from pdspec.study.cells.grid import StudyConfig, cells
from pdspec.study.cells.loads import parse_load
from pdspec.study.cells.measures import by_turn, split
from pdspec.study.cells.measures import energy as joules_of
from pdspec.study.cells.openai_source import content_of, stats_of, text_of
from pdspec.study.cells.requests import Chats, Requests
from pdspec.study.cells.run import on_this_machine
from pdspec.study.cells.store import Store
from pdspec.study.prompts import example_folder

PROMPTS = [
    Prompt(id="a", category="", text="Name a river.", later=("And a lake?",)),
    Prompt(id="b", category="", text="Count to three."),
    Prompt(id="c", category="", text="Wie heißt das größte Tier?"),
]


def study(**workload):
    values = {"models": ["tiny"], "drafters": ["none"], "pd": ["0P1D"], "worker": {"threads": 1}, "workload": workload}
    return StudyConfig.from_mapping(values)


def test_studies_without_the_new_keys_keep_the_ids_of_their_cells(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "one"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        (plain,) = cells(study(prompts="own.jsonl"))
        assert plain.id == "01b4f4dced8b"
        found = {cells(study(prompts="own.jsonl", **more))[0].id for more in ({"turns": 2}, {"prompt_tokens": 9})}
    assert plain.id not in found and len(found) == 2


@pytest.mark.parametrize(
    ("workload", "field"),
    [
        ({"requests": 16, "turns": 3}, "requests"), ({"turns": 0}, "turns"), ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"turns": "two"}, "turns"),
    ],
)  # fmt: skip
def test_workloads_that_make_no_sense_are_refused(workload, field):
    with pytest.raises(ConfigError) as refused:
        cells(study(**workload))
    assert refused.value.field == field and refused.value.remedy


@pytest.mark.parametrize("name", ["turns", "prompt_tokens"])
def test_a_trace_has_conversations_and_lengths_of_its_own(name):
    trace = f"trace {example_folder().parent}/traces/mooncake-sample.jsonl"
    with pytest.raises(ConfigError, match="of its own") as refused:
        cells(study(**{name: 2}).replace(loads=(trace,)))
    assert refused.value.field == name


def test_files_bring_later_turns_and_others_get_general_ones(tmp_path):
    path = tmp_path / "turns.jsonl"
    path.write_text('{"question_id": 1, "turns": ["One?", "Two?"]}\n{"prompt": "Alone."}\n')
    first, second = load_prompts(path)
    assert (first.text, first.later, second.later) == ("One?", ("Two?",), ())
    assert [follow_up(first, turn) for turn in (2, 3)] == ["Two?", FOLLOW_UPS[1]]
    assert follow_up(second, 2) == FOLLOW_UPS[0] == follow_up(second, 2 + len(FOLLOW_UPS))
    path.write_text('{"turns": ["One?", 2]}\n')
    with pytest.raises(ConfigError, match="turns.jsonl:1: no prompt"):
        load_prompts(path)


def test_turns_stand_next_to_each_other_and_bring_the_answers_before_them():
    (cell,) = cells(study(requests=12, turns=3, samples=2, seed=5))
    first = Chats(PROMPTS).of(cell)
    assert [(item.about["prompt"], item.about["sample"], item.about["index"]) for item in first] == [
        ("a", 0, 0), ("a", 1, 3), ("b", 0, 6), ("b", 1, 9),
    ]  # fmt: skip
    second = first[1].then("The Nile.")
    third = second.then("Lake Victoria.")
    assert third.then is None and (third.about["turn"], third.about["index"], third.about["seed"]) == (3, 5, 10)
    assert third.request.sampling.seed == 10 and third.request.cache_salt == first[0].request.cache_salt
    assert third.request.chat == (
        ("user", "Name a river."), ("assistant", "The Nile."), ("user", "And a lake?"),
        ("assistant", "Lake Victoria."), ("user", FOLLOW_UPS[1]),
    )  # fmt: skip
    (warm,) = Chats(PROMPTS).warming(cell)
    assert warm.then is None and warm.request.cache_salt != first[0].request.cache_salt


def test_own_processes_are_asked_the_same_as_token_ids():
    (cell,) = cells(study(requests=2, turns=2))
    (item,) = Requests(WorkerConfig(model="tiny"), PROMPTS).of(cell)
    chats = load_tokenizer("tiny").apply_chat(
        [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "Nile"},
         {"role": "user", "content": "And a lake?"}]
    )  # fmt: skip
    assert item.then("Nile").request.prompt_ids == tuple(chats)


@pytest.mark.parametrize("tokens", [200, 201, 202, 203, 1000])
def test_long_prompts_have_the_tokens_that_were_asked(tokens):
    tokenizer = load_tokenizer("tiny")
    texts = long_texts(PROMPTS, tokenizer, tokens)
    sizes = [len(tokenizer.apply_chat([{"role": "user", "content": text}])) for text in texts]
    assert all(tokens - 2 <= size <= tokens for size in sizes), sizes  # a cut ß is no whole character
    assert sizes[1] == tokens or tokens > 200
    for place, text in enumerate(texts):
        assert text.endswith("\n\n" + PROMPTS[place].text) and text.startswith(PROMPTS[(place + 1) % 3].text)


def test_a_prompt_that_is_longer_itself_is_refused():
    with pytest.raises(ConfigError, match="'a' has") as refused:
        long_texts(PROMPTS, load_tokenizer("tiny"), 5)
    assert refused.value.field == "prompt_tokens"


def answering(refuse=()):
    """A source that answers with the last user message, and the messages that it was asked with."""
    heard = []

    class Source:
        async def stream(self, request):
            said = [text for _, text in request.chat]
            heard.append(said)
            if len(heard) in refuse:
                raise Overloaded("full")
            yield Heard(text=said[-1].upper(), token_ids=(1,))
            yield Heard(brings=False, finish_reason="length", output_tokens=1)

    @asynccontextmanager
    async def opened():
        yield Source()

    return opened(), heard


@pytest.mark.parametrize("load", ["closed 1", "poisson 1000"])
def test_each_conversation_goes_on_with_its_own_answers(load):
    (cell,) = cells(study(requests=4, turns=2))
    source, heard = answering()
    rows = []
    send(source, Chats(PROMPTS).of(cell), parse_load(load), seed=0, on_row=rows.append)
    assert sorted(row["index"] for row in rows) == [0, 1, 2, 3]
    assert ["Name a river.", "NAME A RIVER.", "And a lake?"] in heard
    assert ["Count to three.", "COUNT TO THREE.", FOLLOW_UPS[0]] in heard


def test_a_refused_turn_ends_its_conversation_alone():
    (cell,) = cells(study(requests=6, turns=3))
    source, _ = answering(refuse=(2,))
    rows = []
    send(source, Chats(PROMPTS).of(cell), parse_load("closed 1"), seed=0, on_row=rows.append)
    assert [(row["index"], bool(row["error"])) for row in rows] == [
        (0, False), (1, True), (3, False), (4, False), (5, False)
    ]  # fmt: skip


def test_an_openai_server_may_say_what_was_cached_and_its_thoughts_are_not_sent_back():
    usage = {"prompt_tokens": 30, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 16}}
    stats = stats_of({"usage": usage})
    assert stats is not None and (stats.prompt_tokens, stats.cached_tokens) == (30, 16)
    assert stats_of({"usage": {"prompt_tokens": 30}}) is None is stats_of({})
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    assert text_of(thought) == "hm" and content_of(thought) == ""


def worker(name="d0", role="decode", **metrics):
    return {"worker_id": name, "address": "", "role": role, "metrics": metrics}


def test_clocks_count_decode_workers_that_stayed():
    before = clocks.reading([worker(draft_seconds=1.0, forward_seconds=2.0), worker("p0", "prefill")])
    after = clocks.reading([worker(draft_seconds=2.0, forward_seconds=5.0, verify_seconds=1.0, verifications=9)])
    assert clocks.between(before, after) == {"draft": 1.0, "forward": 3.0, "verify": 1.0, "workers": 1.0}
    assert clocks.between(after, before) is None, "started anew"
    assert clocks.between(before, clocks.reading([worker("other")])) is None
    assert clocks.between(None, after) is None and clocks.between({}, {}) is None


def test_clocks_are_read_once_they_have_every_answer(monkeypatch):
    told = [3.0, 3.0, 7.0, 7.0]

    class Router:
        def __init__(self, *_):
            self.asked = 0

        def workers(self):
            self.asked += 1
            return [worker(verifications=told[min(self.asked, len(told)) - 1])]

        def close(self):
            self.asked = -1

    monkeypatch.setattr(clocks, "RouterClient", Router)
    monkeypatch.setattr(clocks, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(clocks, "_POLL_S", 0.0)
    with clocks.WorkerClocks("") as found:
        assert found.read()["d0"]["verifications"] == 3.0
        found.answered(4)
        assert found.read()["d0"]["verifications"] == 7.0
        found.answered(1)
        assert found.read() is None, "the router never hears of it"


def test_shares_of_a_step_add_up_and_busy_is_of_the_span():
    found = split({"draft": 1.0, "forward": 6.0, "verify": 1.0, "workers": 2.0}, 8.0)
    assert found == {"draft_share": 0.125, "verify_share": 0.75, "other_share": 0.125, "busy_share": 0.5}
    assert set(split(None, 8.0).values()) == {None}


def test_first_turns_and_later_ones_are_told_apart():
    def row(turn, ttft, prompt, cached, apart=0, prefill="p0"):
        return {"turn": turn, "ttft_ms": ttft, "prompt_tokens": prompt, "cached_tokens": cached,
                "prefill_cached_tokens": apart, "prefill_worker": prefill, "decode_worker": "d0"}  # fmt: skip

    found = by_turn([row(1, 50.0, 10, 0), row(2, 20.0, 30, 16, apart=8), row(3, 30.0, 40, 32, prefill="d0")])
    assert (found["ttft_ms_turn_1_p50"], found["ttft_ms_later_turns_p50"]) == (50.0, 20.0)
    assert found["cached_share"] == 40 / 80 and found["cached_share_later_turns"] == 40 / 70
    old = by_turn([{"ttft_ms": 5.0, "prompt_tokens": 3}])
    assert old["ttft_ms_turn_1_samples"] == 1 and old["cached_share"] is None and old["ttft_ms_later_turns_p50"] is None


def zone(folder, name, title, energy_uj, limit=1_000_000):
    path = folder / name
    path.mkdir()
    for file, value in (("name", title), ("energy_uj", energy_uj), ("max_energy_range_uj", limit)):
        (path / file).write_text(f"{value}\n")
    return path / "energy_uj"


def test_rapl_counts_packages_and_memory_across_a_wrap(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:1", "psys", 5)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5)
    (tmp_path / "intel-rapl").mkdir()
    found = energy.rapl(tmp_path)
    assert [(one.name, one.wraps_at) for one in found] == [("package-0", 1.0), ("dram-0", 1.0)]
    meter = energy.EnergyMeter(found)
    package.write_text("100000\n")
    meter.tick()
    package.write_text("300000\n")
    memory.write_text("500100\n")
    assert meter.stop() == pytest.approx({"package-0": 0.4, "dram-0": 0.5}) and not meter.failed
    package.unlink()
    assert meter.stop() == {} and "package-0" in meter.failed
    assert energy.EnergyMeter(()).stop() == {} and energy.rapl(tmp_path / "nowhere") == []


def test_a_counter_that_cannot_be_read_is_not_there(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 1).unlink()
    assert energy.rapl(tmp_path) == []


def test_gpus_count_where_the_library_and_the_driver_do(monkeypatch):
    class NVMLError(Exception):
        pass

    def consumed(handle):
        if handle == 1:
            raise NVMLError("not supported")
        return next(values)

    values = iter((5000, 5000, 9500, 100))
    fake = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda place: place, nvmlDeviceGetTotalEnergyConsumption=consumed,
    )  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    (counter,) = energy.nvml()
    meter = energy.EnergyMeter((counter,))
    meter.tick()
    assert counter.name == "gpu-0" and meter._joules == [4.5]
    assert meter.stop() == {} and "went back" in meter.failed
    monkeypatch.setattr(fake, "nvmlInit", lambda: consumed(1))
    assert energy.nvml() == []
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert energy.nvml() == []


def test_joules_are_of_all_counters_or_not_reported():
    assert joules_of({"package-0": 6.0, "gpu-0": 4.0}, 5) == {
        "joules": 10.0, "joules_per_output_token": 2.0, "energy_counters": "package-0, gpu-0"
    }  # fmt: skip
    assert joules_of({}, 5) == {"joules": None, "joules_per_output_token": None, "energy_counters": ""}
    assert joules_of({"gpu-0": 1.0}, 0)["joules_per_output_token"] is None


def test_energy_is_that_of_deployments_on_this_machine():
    here = ["", "live 127.0.0.1:50051", "live [::1]:5", "openai http://localhost:8000/v1", "openai http://127.0.0.2/v1"]
    there = ["live 10.0.0.5:50051", "live box:5", "openai https://api.example.com/v1"]
    assert [on_this_machine(one) for one in here + there] == [True] * 5 + [False] * 3


def test_what_a_cell_took_is_kept_with_its_rows(tmp_path):
    (cell,), store = cells(study()), Store(tmp_path)
    with store.held():
        with store.writing(cell) as write:
            write({"index": 0})
            write({"clocks": {"draft": 1.0}, "joules": None})
        assert [row["index"] for row in store.rows(cell)] == [0]
        assert store.spent(cell) == {"cell": cell.id, "clocks": {"draft": 1.0}, "joules": None}
        store.path(cell).write_text(json.dumps({"cell": cell.id, "index": 0}) + "\n")
        assert store.spent(cell) == {}, "of an older version"
