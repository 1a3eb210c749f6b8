"""pdspec.AsyncClient against a router over fakes: answers, log probabilities' texts, fitted lengths, cancels."""

from __future__ import annotations

from contextlib import aclosing

from asking import EXPECTED, run, until
from fake_decode import FakeDecode, cluster

import pdspec


def test_generate_stream_and_leave() -> None:
    async def scenario() -> None:
        worker = FakeDecode(max_context=60)
        async with cluster(worker, lost_after_s=30.0) as box, pdspec.AsyncClient(box.router.address) as client:
            answer = await client.generate("Hello", max_tokens=20)
            assert answer.text == EXPECTED and answer.stats.output_tokens == 20
            await client.chat("Hi", max_tokens=100, fit_context=True)
            request = worker.requests[-1][0]
            assert len(request.prompt_ids) + request.sampling.max_tokens == 60
            worker.hold_after = 4
            async with aclosing(client.stream("Hello", max_tokens=20)) as pieces:
                assert (await anext(pieces)).text == "T"
            await until(lambda: worker.cancelled == 1 and worker.running == 0)

    run(scenario)
