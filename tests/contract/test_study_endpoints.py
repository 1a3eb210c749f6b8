"""Deployments that are there already as cells of a study: a router over gRPC, and servers with OpenAI's API."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pdspec.config import WorkerConfig
from pdspec.errors import InvalidRequest, PeerLost
from pdspec.study.cells.grid import StudyConfig
from pdspec.study.cells.report import report
from pdspec.study.cells.run import run
from pdspec.study.cells.store import Store
from pdspec.study.cells.tables import read
from pdspec.study.processes import process
from pdspec.study.stack import Stack

pytest.importorskip("pyarrow")


def study(*places: str) -> StudyConfig:
    return StudyConfig.from_mapping({
        "name": "endpoints", "models": ["tiny"], "drafters": ["none", "ngram"], "pd": places, "loads": ["closed 2"],
        "workload": {"requests": 3, "max_tokens": 16},
    })  # fmt: skip


def test_a_router_and_its_http_front_are_cells_of_one_study(tmp_path):
    pytest.importorskip("matplotlib")
    config = WorkerConfig(model="tiny", drafter="none", drafters=("none", "ngram"), cache_tokens=4096, threads=1)
    http = ("--port", "0", "--router")
    with Stack(config, prefill=0) as stack, process("pdspec.gateway", *http, stack.endpoint) as front:
        places = f"live {stack.endpoint}", f"openai http://{front.address}/v1"
        result = run(study(*places), tmp_path, progress=lambda text: None)
    assert [(row["pd"], row["drafter"]) for row in result["cells"]] == [
        (places[0], "none"), (places[0], "ngram"), (places[1], "served")
    ]  # fmt: skip
    table = read(tmp_path / "cells.parquet")
    assert [row["output_tokens"] for row in table] == [48, 48, 48]
    assert table[0]["acceptance_length"] == 1.0 and table[2]["acceptance_length"] is None
    assert table[0]["busy_share"] > 0 and table[2]["busy_share"] is None, "a router tells its workers' clocks"
    assert table[2]["repeated_8gram_share"] is None and table[2]["ttft_ms_p50"] > 0 and table[2]["tpot_ms_p50"] > 0
    rows = read(tmp_path / "requests.parquet")
    assert all(row["finish_reason"] == "length" for row in rows)
    assert len(report(tmp_path)["figures"]) >= 4


EVENT = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": null}]}\n\n'
END = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'


@contextmanager
def server(*answers: tuple[int, bytes]) -> Iterator[str]:
    """Gives these answers in turn, the last one for ever."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, data = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"openai http://127.0.0.1:{http.server_port}/v1"
        finally:
            http.shutdown()
            thread.join()


def test_a_refusal_is_a_row_and_counts_against_goodput(tmp_path):
    with server((200, EVENT + END), (429, b"{}"), (200, EVENT * 4 + END)) as place:  # the first one only warms up
        (row,) = run(study(place), tmp_path, progress=lambda text: None)["cells"]
    assert (row["rows"], row["refused"], row["output_tokens"]) == (3, 1, 8)
    assert row["good_share"] == pytest.approx(2 / 3)
    errors = [one["error"] for one in read(tmp_path / "requests.parquet")]
    assert sorted(bool(error) for error in errors) == [False, False, True]


@pytest.mark.parametrize(
    ("answer", "error"),
    [((200, EVENT), PeerLost), ((200, b"data: {broken\n\n"), PeerLost), ((404, b"no such model"), InvalidRequest),
     ((200, b'data: {"error": {"message": "gone"}}\n\n'), PeerLost)],
)  # fmt: skip
def test_an_answer_that_is_cut_or_wrong_ends_the_study_and_leaves_no_cell(tmp_path, answer, error):
    with server((200, EVENT + END), answer) as place:
        asked = study(place)
        with pytest.raises(error):
            run(asked, tmp_path, progress=lambda text: None)
    from pdspec.study.cells.grid import cells

    assert not any(map(Store(tmp_path).has, cells(asked)))
