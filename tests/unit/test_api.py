"""``import pdspec`` is light, and the clients' options become the request that they name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pdspec.api import _chat_request, _prompt_request
from pdspec.errors import InvalidRequest


def test_import_is_light_and_the_clients_need_no_torch():
    code = (
        "import sys, pdspec; light = set(sys.modules); pdspec.Client, pdspec.AsyncClient;"
        "print('grpc' in light, 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False", "False"]


def test_options_become_a_request():
    request, timeout_s = _prompt_request("Hi", {
        "stop": "x", "json_schema": {"type": "object"}, "logit_bias": {3: 1.0}, "drafter": "ngram", "timeout_s": 2.0,
    })  # fmt: skip
    assert (request.text, request.drafter, timeout_s) == ("Hi", "ngram", 2.0)
    assert (request.sampling.stop_strings, request.sampling.logit_bias) == (("x",), ((3, 1.0),))
    assert request.sampling.json_schema == '{"type": "object"}'
    assert _prompt_request([1, 2], {})[0].prompt_ids == (1, 2)
    assert _chat_request("Hi", {})[0].chat == (("user", "Hi"),)


def test_an_unknown_option_or_message_is_refused():
    with pytest.raises(InvalidRequest, match="temperature"):
        _prompt_request("Hi", {"temprature": 1.0})
    with pytest.raises(InvalidRequest, match="messages"):
        _chat_request([{"role": "user"}], {})
