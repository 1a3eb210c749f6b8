"""OpenAI's API in front of a router over fake decode workers, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import openai
import pytest
from asking import run, until
from fake_decode import TEXT, Cluster, FakeDecode, cluster

from pdspec.config import HttpConfig
from pdspec.errors import Overloaded
from pdspec.gateway.service import Gateway, serving

HELLO = [{"role": "user", "content": "Hello"}]
EXPECTED = TEXT[:20].decode()


@dataclass
class Front:
    box: Cluster
    gateway: Gateway
    client: openai.AsyncOpenAI

    @property
    def url(self) -> str:
        return f"http://{self.gateway.address}"

    async def post(self, path: str, body: object, headers: dict | None = None) -> tuple[int, dict, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{self.url}{path}", data=data, headers=headers) as answer:
                return answer.status, await answer.json(), dict(answer.headers)


@asynccontextmanager
async def front(*workers: FakeDecode, token: str = "none", **settings: object) -> AsyncIterator[Front]:
    async with openai.AsyncOpenAI(base_url="http://x", api_key=token, max_retries=0) as client:  # slow to make
        async with cluster(*workers, **{"lost_after_s": 30.0, **settings}) as box:
            async with serving(HttpConfig(port=0, router=box.router.address, max_tokens=20)) as gateway:
                client.base_url = f"http://{gateway.address}/v1"  # type: ignore[assignment]
                yield Front(box, gateway, client)


def test_chat_and_completion_answer_with_usage() -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with front(worker) as http:
            chat = await http.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, seed=4)
            (choice,) = chat.choices
            assert (choice.message.content, choice.message.role, choice.finish_reason) == (
                EXPECTED,
                "assistant",
                "length",
            )
            prompt = len(worker.requests[0][0].prompt_ids)
            assert chat.usage and chat.usage.to_dict() == {
                "prompt_tokens": prompt, "completion_tokens": 20, "total_tokens": prompt + 20,
            }  # fmt: skip
            assert worker.requests[0][0].sampling.seed == 4 and worker.requests[0][0].sampling.temperature == 1.0
            text = await http.client.completions.create(model="tiny", prompt="Hello", temperature=0, echo=True)
            assert text.choices[0].text == "Hello" + TEXT[:16].decode()
            assert text.id.startswith("cmpl-") and text.object == "text_completion"

    run(scenario)


def test_streams_chunk_by_chunk_with_usage_at_the_end() -> None:
    async def scenario() -> None:
        async with front(FakeDecode(chunk=4)) as http:
            stream = await http.client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[0].choices[0].delta.role == "assistant"
            texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
            assert "".join(texts) == EXPECTED and sum(map(bool, texts)) == 6
            assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
            assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.completion_tokens == 20
            assert len({chunk.id for chunk in chunks}) == 1
            stream = await http.client.completions.create(model="tiny", prompt="Hello", max_tokens=5, stream=True)
            parts = [chunk async for chunk in stream]
            assert "".join(part.choices[0].text for part in parts) == "The q" and parts[-1].usage is None

    run(scenario)


def test_the_stream_on_the_wire_is_server_sent_events() -> None:
    async def scenario() -> None:
        async with front(FakeDecode()) as http:
            body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "stream": True}
            async with aiohttp.ClientSession() as session:
                async with session.post(f"{http.url}/v1/completions", json=body) as answer:
                    assert answer.headers["Content-Type"].startswith("text/event-stream")
                    events = (await answer.text()).split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            assert all(json.loads(event.removeprefix("data: "))["id"].startswith("cmpl-") for event in events[:-2])

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices_keep_their_indices(stream: bool) -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with front(worker) as http:
            made = await http.client.completions.create(
                model="tiny", prompt=["one", "twelve"], n=2, max_tokens=6, stream=stream, seed=9,
                **({"stream_options": {"include_usage": True}} if stream else {}),
            )  # fmt: skip
            texts, usage = ["", "", "", ""], None
            if stream:
                async for chunk in made:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        texts[choice.index] += choice.text
            else:
                texts, usage = [choice.text for choice in made.choices], made.usage
                assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
            assert texts == [TEXT[:6].decode()] * 4
            asked = {request.request_id[-1]: request for request, _ in worker.requests}
            assert [asked[key].sample for key in "0123"] == [0, 1, 0, 1]
            assert {request.sampling.seed for request in asked.values()} == {9}
            prompts = len(asked["0"].prompt_ids) + len(asked["2"].prompt_ids)
            assert (usage.prompt_tokens, usage.completion_tokens) == (prompts, 24)

    run(scenario)


def test_every_field_reaches_the_worker() -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with front(worker) as http:
            await http.client.chat.completions.create(
                model="tiny", max_completion_tokens=4, temperature=0.5, top_p=0.9, presence_penalty=0.1,
                frequency_penalty=0.2, logit_bias={"7": -3}, stop=["zz", "yy"], seed=3, user="me",
                messages=[{"role": "developer", "content": [{"type": "text", "text": "Be brief"}]}, *HELLO],
                extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 1, "stop_token_ids": [8],
                            "drafter": "ngram", "tree": "chain(2)", "verify": "rejection"},
            )  # fmt: skip
            request = worker.requests[0][0]
            sampling = request.sampling
            assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
            assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2)
            assert (sampling.repetition_penalty, sampling.logit_bias) == (1.2, ((7, -3.0),))
            assert (sampling.max_tokens, sampling.min_tokens, sampling.stop_ids) == (4, 1, (8,))
            assert (request.drafter, request.tree, sampling.verify) == ("ngram", "chain(2)", "rejection")

    run(scenario)


def test_a_chat_that_names_no_length_fits_the_context() -> None:
    async def scenario() -> None:
        worker = FakeDecode(max_context=30)
        async with front(worker) as http:
            await http.client.completions.create(model="tiny", prompt="a" * 24)
            request = worker.requests[0][0]
            assert len(request.prompt_ids) + request.sampling.max_tokens == 30
            with pytest.raises(openai.BadRequestError) as caught:
                await http.client.completions.create(model="tiny", prompt="a" * 24, max_tokens=16)
            assert caught.value.param == "max_tokens"

    run(scenario)


REFUSED = [
    ("/v1/chat/completions", {"model": "tiny"}, "messages"),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user"}]}, "messages[0].content"),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"content": "x", "role": 3}]}, "messages[0].role"),
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "temprature": 1}, "temprature"),
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "temperature": "hot"}, "temperature"),
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "top_p": 1.5}, "top_p"),
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "n": 0}, "n"),
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "stream_options": {}}, "stream_options"),
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "stop": [1]}, "stop"),
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "response_format": {"type": "xml"}},
     "response_format.type"),
    ("/v1/completions", {"model": "tiny", "prompt": [[1], "x"]}, "prompt"),
    ("/v1/completions", {"model": "tiny", "prompt": [1 << 40]}, "prompt"),
    ("/v1/completions", {"model": "tiny", "prompt": ""}, "prompt"),
    ("/v1/completions", {"model": "tiny", "prompt": "x", "best_of": 4}, "best_of"),
    ("/v1/completions", [1], "body"),
    ("/v1/completions", b"{", "body"),
    ("/v1/completions", b"[" * 100_000, "body"),
]  # fmt: skip


def test_what_is_refused_names_its_field_in_openais_shape() -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with front(worker) as http:
            for path, body, param in REFUSED:
                status, answer, _ = await http.post(path, body)
                error = answer["error"]
                assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), body
                assert error["message"] and error.keys() == {"message", "type", "param", "code"}
            status, answer, _ = await http.post("/v1/completions", {"model": "gpt-9", "prompt": "x"})
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
            assert "tiny" in answer["error"]["message"]
            status, answer, _ = await http.post("/v1/embeddings", {})
            assert (status, answer["error"]["code"]) == (404, "http_404")
            status, answer, _ = await http.post("/v1/completions", b" " * (5 << 20))
            assert (status, answer["error"]["code"]) == (413, "http_413")
            assert not worker.requests

    run(scenario)


def test_overload_is_429_with_the_time_to_wait() -> None:
    async def scenario() -> None:
        worker = FakeDecode(fail_with=Overloaded("full", retry_after_ms=1500))
        async with front(worker) as http:
            with pytest.raises(openai.RateLimitError) as caught:
                await http.client.completions.create(model="tiny", prompt="x", stream=True)
            headers = caught.value.response.headers
            assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1500")
            assert caught.value.type == "rate_limit_error"

    run(scenario)


def test_tokens_are_passed_through_and_judged_by_the_router(tmp_path) -> None:
    (tmp_path / "tokens").write_text("a-token-of-a-user-0123456789\n")

    async def scenario() -> None:
        settings = {"token_file": str(tmp_path / "tokens")}
        async with front(FakeDecode(), token="a-token-of-a-user-0123456789", **settings) as http:
            answer = await http.client.completions.create(model="tiny", prompt="x", max_tokens=3)
            assert answer.choices[0].text == "The" and [m.id async for m in http.client.models.list()] == ["tiny"]
            with pytest.raises(openai.AuthenticationError) as caught:
                await http.client.with_options(api_key="another-token-0123456789").completions.create(
                    model="tiny", prompt="x"
                )
            assert caught.value.code == "invalid_api_key"
            for headers in ({}, {"Authorization": "Bearer \u00e9"}):
                status, answer, got = await http.post("/v1/completions", {"model": "tiny", "prompt": "x"}, headers)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
                assert got["WWW-Authenticate"] == "Bearer"

    run(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_the_worker(stream: bool) -> None:
    async def scenario() -> None:
        worker = FakeDecode(hold_after=4)
        async with front(worker) as http:
            made = asyncio.ensure_future(
                http.client.completions.create(model="tiny", prompt="x", max_tokens=20, stream=stream, n=2)
            )
            await until(lambda: worker.running == 2)
            if stream:
                opened = await made
                await anext(aiter(opened))
                await opened.close()
            else:
                made.cancel()
            await until(lambda: worker.cancelled == 2 and worker.running == 0)
            await until(lambda: not http.box.router._live)

    run(scenario)


def test_an_error_after_the_first_token_is_an_event() -> None:
    async def scenario() -> None:
        async with front(FakeDecode(die_after=4)) as http:
            stream = await http.client.completions.create(model="tiny", prompt="x", max_tokens=20, stream=True)
            got = ""
            with pytest.raises(openai.APIError) as caught:
                async for chunk in stream:
                    got += chunk.choices[0].text
            assert got and TEXT[:4].decode().startswith(got) and caught.value.code == "unavailable"
            read = http.gateway.metrics.registry.get_sample_value
            assert read("pdspec_http_broken_streams_total", {"error": "PeerLost"}) == 1
            assert read("pdspec_http_requests_total", {"route": "/v1/completions", "status": "200"}) == 1

    run(scenario)


def test_models_health_and_what_is_counted() -> None:
    async def scenario() -> None:
        async with front(FakeDecode(max_context=512)) as http:
            model = await http.client.models.retrieve("tiny")
            assert (model.id, model.owned_by, model.to_dict()["max_model_len"]) == ("tiny", "pdspec", 512)
            with pytest.raises(openai.NotFoundError):
                await http.client.models.retrieve("gpt-9")
            async with aiohttp.ClientSession() as session:
                for path in ("/health", "/live"):
                    async with session.get(f"{http.url}{path}") as answer:
                        assert answer.status == 200
                http.box.router.set_workers(prefill=(), decode=())
                await asyncio.sleep(0)  # the router's health is set on its loop, which is this one
                async with session.get(f"{http.url}/health") as answer:
                    assert answer.status == 503
            read = http.gateway.metrics.registry.get_sample_value
            assert read("pdspec_http_requests_total", {"route": "/health", "status": "503"}) == 1

    run(scenario)
