"""Structured answers through the handoff, and a prompt that cannot be answered."""

from __future__ import annotations

import grpc
import pytest

from tests.parity.roles import request, running, wait_until


def test_structured_answers_and_a_prompt_that_cannot_go_on():
    with running() as roles:
        for drafter in ("none", "ngram", "eagle3"):
            asked = request(drafter, sampling={"choice": ("yes", "yellow"), "ignore_eos": False})
            (answer,) = roles.ask(asked)
            assert answer.tokens == roles.ask_local(asked).tokens
            assert bytes(answer.tokens[:-1]).decode() in ("yes", "yellow")
        # Every token is excluded: that request ends, its prefill worker does not.
        end = roles.local.resources.end_ids[0]
        dead = request("none", sampling={"allowed_ids": (end,), "min_tokens": 1, "ignore_eos": False})
        with pytest.raises(grpc.RpcError) as caught:
            roles.ask(dead)
        assert "every token is excluded" in caught.value.details()
        assert roles.prefill.alive() and wait_until(lambda: roles.held() == 0)
        assert roles.ask(request("none"))[0].tokens
