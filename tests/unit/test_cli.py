"""The command line: one JSON object, one-line errors, flags over files; against a router that only pretends."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager

import pytest

from pdspec.cli import app, detached
from pdspec.cli.demo import table
from pdspec.cli.options import cluster_config, worker_flags
from pdspec.client import Answer, Piece, RouterClient, collect
from pdspec.errors import ConfigError, InvalidRequest, Overloaded, PeerLost
from pdspec.types import FinishReason, GenerationStats, SamplingParams, TokenChunk, UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import bind, make_server
from pdspec.wire.codec import generate_chunk_to_pb, user_request_from_pb
from pdspec.wire.serving import ServiceThread

STATS = GenerationStats(
    prompt_tokens=9, output_tokens=5, verifications=2, first_draft_accepted=1, kv_bytes=2048, draft_kv_bytes=128,
    prefill_worker="prefill-0", decode_worker="decode-0", drafter="ngram", handoff="direct",
)  # fmt: skip


class PretendRouter(rpc.RouterServicer):
    """Answers "to be or" with five tokens in three chunks; text "full" and "hang" do what they say."""

    def __init__(self) -> None:
        self.address = ""
        self.seen: list[UserRequest] = []
        self.cancelled = 0

    async def Generate(self, message, context):
        request = user_request_from_pb(message)
        self.seen.append(request)
        if request.text == "full":
            raise Overloaded("no room", field="request", remedy="come back later")
        if request.text == "hang":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        for start, ids, text in ((0, (1,), "to"), (1, (2, 3), " be"), (3, (4, 5), " or")):
            last = start == 3
            chunk = TokenChunk(
                request_id="r", start=start, token_ids=ids, finish_reason=FinishReason.LENGTH if last else None,
                stats=STATS if last else None,
            )  # fmt: skip
            yield generate_chunk_to_pb(chunk, text=text, seed=77 if start == 0 else None)

    async def ListWorkers(self, message, context):
        return pb.ListWorkersResponse(workers=[pb.WorkerStatus(worker_id="decode-0", state="ready", drafters=["none"])])


@asynccontextmanager
async def pretending(router):
    server = make_server()
    rpc.add_RouterServicer_to_server(router, server)
    router.address = bind(server, "127.0.0.1", 0)
    await server.start()
    yield router
    await server.stop(0)


@pytest.fixture
def router():
    router = PretendRouter()
    thread = ServiceThread(lambda: pretending(router), name="pretend")
    yield router
    thread.stop()


def run(monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["pdspec", *argv])
    with pytest.raises(SystemExit) as ended:
        app.main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_generate_json_has_the_promised_fields(monkeypatch, capsys, router):
    argv = ("generate", "hi", "--endpoint", router.address, "--json", "--temperature", "0.8", "--top-p", "0.95")
    argv = (*argv, "--top-k", "40", "--seed", "5", "--max-tokens", "9", "--drafter", "ngram")
    code, out, _ = run(monkeypatch, capsys, *argv)
    assert code == 0 and out.count("\n") == 1
    answer = json.loads(out)
    assert answer["text"] == "to be or" and answer["token_ids"] == [1, 2, 3, 4, 5]
    assert (answer["finish_reason"], answer["prompt_tokens"], answer["verifications"]) == ("length", 9, 2)
    assert answer["acceptance_length"] == 2.0 and answer["first_draft_accepted"] == 1
    assert (answer["prefill_worker"], answer["decode_worker"]) == ("prefill-0", "decode-0")
    assert (answer["kv_bytes"], answer["draft_kv_bytes"], answer["seed"]) == (2048, 128, 77)
    assert answer["ttft_ms"] > 0 and answer["tpot_ms"] >= 0
    assert answer["hardware"]["cores"] >= 1 and answer["versions"]["python"]
    (request,) = router.seen
    assert request.chat == (("user", "hi"),) and request.text is None and request.drafter == "ngram"
    assert request.sampling == SamplingParams(temperature=0.8, top_p=0.95, top_k=40, seed=5, max_tokens=9)


def test_generate_streams_text_on_stdout_and_the_summary_on_stderr(monkeypatch, capsys, router):
    code, out, err = run(monkeypatch, capsys, "generate", "hi", "--raw", "--endpoint", router.address)
    assert code == 0 and out == "to be or\n"
    assert "prefill-0 → decode-0" in err and "seed 77" in err
    assert router.seen[0].text == "hi" and router.seen[0].chat is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("generate", "full", "--raw"), "error: request: no room (come back later)"),
        (("generate", "x", "--dtype", "float32"), "--dtype"),
        (("up", "--set", "worker.prot=1"), "did you mean 'port'?"),
        (("up", "--drafter", "eagle"), "did you mean 'eagle3'?"),
        (("up", "--config", "/nowhere.yaml"), "cannot read /nowhere.yaml"),
        (("up", "--head", "eagle3"), "DRAFTER=FOLDER"),
        (("generate", "x", "--local", "--model", "tiny", "--drafter", "none", "--max-tokens", "0"), "max_tokens"),
    ],
)
def test_user_errors_are_one_line(monkeypatch, capsys, router, argv, expected):
    endpoint = ("--endpoint", router.address) if argv[0] == "generate" else ()
    code, out, err = run(monkeypatch, capsys, *argv, *endpoint)
    assert code == 2 and out == ""
    assert expected in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


def test_no_router(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "generate", "x", "--endpoint", "127.0.0.1:1")
    assert code == 2 and "no router answers at 127.0.0.1:1" in err and "pdspec up" in err


def test_unknown_flags_are_refused(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "up", "--decoders", "3")
    assert code == 2 and "--decoders" in err


@pytest.mark.parametrize(("command", "name"), [("models", "smollm2-135m"), ("drafters", "eagle3")])
def test_lists(monkeypatch, capsys, command, name):
    code, out, _ = run(monkeypatch, capsys, command, "--json")
    listed = json.loads(out)
    assert code == 0 and name in [row["name"] for row in listed[command]] and "versions" in listed
    code, out, _ = run(monkeypatch, capsys, command)
    assert code == 0 and name in out


def test_flags_win_over_sets_and_sets_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("decode: 2\nworker: {chunk: 64, dtype: float32}\n")
    flags = worker_flags(dtype="bfloat16")
    config = cluster_config(config=path, sets=["worker.chunk=32", "prefill=3"], worker=flags, router={"port": None})
    assert (config.decode, config.prefill, config.worker.chunk, config.worker.dtype) == (2, 3, 32, "bfloat16")
    with pytest.raises(ConfigError, match="--set"):
        cluster_config(sets=["worker.chunk"])


def test_a_folder_becomes_absolute_and_a_name_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head").mkdir()
    assert worker_flags(heads=["eagle3=head"])["heads"] == {"eagle3": str(tmp_path / "head")}
    assert worker_flags(heads=["eagle3=random:3"])["heads"] == {"eagle3": "random:3"}


def test_client_cancels_what_it_abandons(router):
    with RouterClient(router.address) as client:
        stream = client.stream(UserRequest(text="hang"), timeout_s=0.3)
        with pytest.raises(Exception, match="DEADLINE"):
            next(stream)
        client.wait_ready(workers=1)
        assert client.workers()[0]["drafters"] == ["none"]
        with pytest.raises(PeerLost, match="2 workers were not ready"):
            client.wait_ready(workers=2, timeout_s=0.2)
    assert router.cancelled == 1


def piece(start: int, count: int, finish: FinishReason | None = None) -> Piece:
    chunk = TokenChunk(request_id="r", start=start, token_ids=(7,) * count, finish_reason=finish)
    return Piece(chunk=chunk, text="x")


@pytest.mark.parametrize(
    "pieces", [[], [piece(0, 1)], [piece(0, 2), piece(3, 1)], [piece(0, 2), piece(1, 1)]],
    ids=["nothing", "no end", "a gap", "a repeat"],
)  # fmt: skip
def test_a_cut_answer_never_looks_complete(pieces):
    with pytest.raises(PeerLost):
        collect(pieces)


def test_demo_table_names_workers_and_ratio():
    def answer(tpot_ms: float, drafter: str) -> Answer:
        return Answer(
            text="", token_ids=(1, 2), finish_reason="length", stop_match="", seed=0, stats=STATS, ttft_ms=10.0,
            total_ms=10.0 + tpot_ms, piece_ms=(10.0,),
        )  # fmt: skip

    answers = {("direct", "ngram"): answer(5.0, "ngram"), ("direct", "none"): answer(10.0, "none")}
    shown = table(answers, {"prefill-0": 41, "decode-0": 42}, "ngram")
    cells = {cell: column for column in range(1, 3) for cell in shown.columns[column].cells}
    assert cells["2.00×"] == 1 and cells["1.00×"] == 2 and "prefill-0 (41)" in cells and "2.0 KB" in cells


def test_records_of_dead_deployments_are_removed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    started = detached._start_time(os.getpid())
    for name, pid, start in (("mine", os.getpid(), started), ("recycled", os.getpid(), "1"), ("gone", 2**22 + 1, "1")):
        record = {"pid": pid, "started": start, "endpoint": name, "log": ""}
        (folder / f"{name}.json").write_text(json.dumps(record))
    assert [state.endpoint for state in detached.running(str(tmp_path))] == ["mine"]
    assert [path.name for path in folder.iterdir()] == ["mine.json"]


def test_raw_and_system_prompts(monkeypatch, capsys, router):
    run(monkeypatch, capsys, "generate", "hi", "--system", "be brief", "--endpoint", router.address, "--stop", "x")
    assert router.seen[0].chat == (("system", "be brief"), ("user", "hi"))
    assert router.seen[0].sampling.stop_strings == ("x",)


def test_lone_surrogates_are_refused_before_they_are_sent(router):
    with RouterClient(router.address) as client, pytest.raises(InvalidRequest):
        client.generate(UserRequest(text="\ud800"))
