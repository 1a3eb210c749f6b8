"""Structured output: which tokens may come next, as a function of the tokens of the answer so far.

    Grammars (one vocabulary) ── start(params) ─▶ Grammar ── extended(tokens) ─▶ Grammar …

A ``Grammar`` is a value. A tree node's is its parent's, extended by one token; a rejected node's is dropped; a replay
extends the first one by the tokens that went out. So nothing needs to be rolled back, and the output stays a function
of (target, prompt, parameters, seed). The automaton is llguidance's: JSON schemas with recursion, regular expressions
and choices, compiled in milliseconds, whose state is copied in microseconds.

JSON is written on one line, with ", " and ": " and no other white space: small models would otherwise indent for ever.
A schema may say otherwise in its own ``x-guidance`` (``whitespace_flexible`` and others, see llguidance).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from pdspec.errors import InvalidRequest, PdspecError
from pdspec.types import SamplingParams

MAX_COMPILED = 64  # grammars of one worker that stay compiled
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
Key = tuple[str, str, tuple[str, ...]]


class Grammar:
    """The state after some tokens. Not shared between threads while it is extended or asked."""

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], *, over: bool = False) -> None:
        self._matcher, self._ends, self._over = matcher, ends, over
        self._mask: npt.NDArray[np.bool_] | None = None

    @property
    def over(self) -> bool:
        """Whether these tokens have left the grammar, or an end token was among them: then every token is allowed.
        No answer goes that way; a drafted chain that is judged as a whole may, and has no chance of being accepted."""
        return self._over

    def extended(self, tokens: Sequence[int]) -> Grammar:
        """The state after ``tokens`` more."""
        if self._over or not tokens:
            return self
        matcher = self._matcher.deep_copy()
        for token in tokens:
            # End tokens never reach the matcher: after one it would not say what is allowed any more.
            if token in self._ends or not matcher.try_consume_tokens([token]):
                return Grammar(matcher, self._ends, over=True)
        return Grammar(matcher, self._ends)

    def allowed(self, size: int) -> npt.NDArray[np.bool_] | None:
        """[size] of the vocabulary; None: every token. End tokens are allowed where the answer is complete. Raises
        PdspecError for a grammar that has become too complex to follow."""
        if self._over:
            return None
        if self._mask is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if self._matcher.is_error():
                remedy = "simplify it"
                raise PdspecError(f"the grammar: {self._matcher.get_error()[:500]}", field="sampling", remedy=remedy)
            self._mask = np.unpackbits(bits, bitorder="little").astype(bool)
        return self._mask[:size]


class Grammars:
    """Compiles what requests ask for. ``tokenizer_json`` is read with the first of them (0.3 s for 49,152 tokens).
    Safe to share between threads."""

    def __init__(self, tokenizer_json: Callable[[], str], *, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer_json, self._vocab_size, self._end_ids = tokenizer_json, vocab_size, tuple(end_ids)
        self._compiled: OrderedDict[Key, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, params: SamplingParams) -> Grammar | None:
        """Before the first token; None where the request asks for no structure. Raises InvalidRequest."""
        if not params.structured:
            return None
        key = (params.json_schema, params.regex, params.choice)
        with self._lock:
            matcher = self._compiled.pop(key, None) or self._compile(params)
            self._compiled[key] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return Grammar(matcher.deep_copy(), frozenset((*self._end_ids, *params.stop_ids)))

    def check(self, params: SamplingParams, replayed: Sequence[int] = ()) -> None:
        """Compiles it. Raises InvalidRequest for what cannot be, and for ``replayed`` tokens that it does not allow."""
        grammar = self.start(params)
        if grammar is not None and grammar.extended(replayed).over:
            remedy = "send the tokens of this answer, and the structure it was asked for with"
            raise InvalidRequest("tokens that the structure does not allow", field="resume_ids", remedy=remedy)

    def _compile(self, params: SamplingParams) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, _source(params), log_level=0)
        if matcher.is_error():
            raise _refusal(params, matcher.get_error())
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=list(self._end_ids))


def check_structure(params: SamplingParams) -> None:
    """Without a vocabulary: what a router can say before anybody works. Raises InvalidRequest."""
    if params.structured:
        wrong, messages = LLMatcher.validate_grammar_with_warnings(_source(params))
        if wrong:
            raise _refusal(params, messages[0])


def _source(params: SamplingParams) -> str:
    if params.regex:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in params.choice))
    try:
        schema = json.loads(params.json_schema)
        if not isinstance(schema, dict | bool):
            raise ValueError("a schema is an object")
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_JSON)
    except (ValueError, RecursionError) as error:
        raise _refusal(params, str(error)) from error


def _refusal(params: SamplingParams, reason: str) -> InvalidRequest:
    name = "regex" if params.regex else "choice" if params.choice else "json_schema"
    remedy = {
        "regex": "write one without look-around and back references",
        "choice": "give texts that are not empty",
        "json_schema": "use what llguidance supports of JSON Schema",
    }[name]
    return InvalidRequest(reason.strip()[:500] or "cannot be compiled", field=f"sampling.{name}", remedy=remedy)
