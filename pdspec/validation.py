"""Every way in which a request can be refused before any work is done. No torch; each error names field and remedy.

The router checks what users send, workers check again what reaches them (they may be called without a router).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from pdspec.errors import InvalidRequest, UnknownName
from pdspec.types import DraftPrefill, GenerateRequest, Handoff, SamplingParams, UserRequest, Verify

MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 256
MAX_STOP_IDS, MAX_BIASES, MAX_LOGPROBS = 256, 4096, 20
MAX_NAME_CHARACTERS = 256
MAX_PRIORITY = 100
MAX_SCHEMA, MAX_REGEX, MAX_CHOICES, MAX_CHOICE = 1 << 16, 1 << 12, 1024, 1024
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100.0  # below it, scores divided by it overflow
MAX_BIAS, MAX_PENALTY, MAX_REPETITION = 100.0, 2.0, 10.0


def check_request(
    request: GenerateRequest,
    *,
    vocab_size: int,
    max_context: int,
    drafters: Collection[str] = (),
    models: Collection[str] = (),
    parse_tree: Callable[[str], object] | None = None,
) -> None:
    """Raises InvalidRequest or UnknownName for what can never be served.

    ``vocab_size`` and ``max_context`` are the target's. ``drafters`` and ``models`` are the names that exist; an
    empty request field means the deployment's own. ``parse_tree`` raises for a tree it does not know
    (``pdspec.spec.tree.parse_tree`` where torch is at hand; None leaves the tree to the worker).
    """
    _check_names(request, drafters, models)
    if request.tree and parse_tree is not None:
        parse_tree(request.tree)
    _check_prompt(request, vocab_size, max_context)
    _check_sampling(request.sampling, vocab_size)


def check_user_request(user: UserRequest) -> None:
    """What can be refused before tokenising: no or an empty prompt, an unknown handoff. Raises InvalidRequest."""
    given = [name for name in ("text", "chat", "prompt_ids") if getattr(user, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(f"{len(given)} inputs were given", field="input", remedy="send text, chat or prompt_ids")
    if not getattr(user, given[0]):
        raise InvalidRequest("the prompt is empty", field=given[0], remedy="send at least one token")
    _check_choice("handoff", user.handoff, [handoff.value for handoff in Handoff])
    for name in ("request_id", "model", "drafter", "tree", "tenant"):
        if len(getattr(user, name)) > MAX_NAME_CHARACTERS:
            raise InvalidRequest("too long", field=name, remedy=f"send at most {MAX_NAME_CHARACTERS} characters")
    if abs(user.priority) > MAX_PRIORITY:
        raise InvalidRequest(f"{user.priority}", field="priority", remedy=f"give -{MAX_PRIORITY}..{MAX_PRIORITY}")


def check_resume(user: UserRequest, *, vocab_size: int) -> None:
    """What the client of a broken stream says it has already. Raises InvalidRequest."""
    if not user.resume_ids:
        return
    if user.sampling.seed is None:
        remedy = "send the seed that came with the first chunk"
        raise InvalidRequest("an answer goes on with its own seed", field="sampling.seed", remedy=remedy)
    if len(user.resume_ids) > user.sampling.max_tokens:
        message = f"{len(user.resume_ids)} tokens of an answer of at most {user.sampling.max_tokens}"
        raise InvalidRequest(message, field="resume_ids", remedy="send the tokens of this answer, and its max_tokens")
    _check_ids("resume_ids", user.resume_ids, vocab_size)


def _check_names(request: GenerateRequest, drafters: Collection[str], models: Collection[str]) -> None:
    _check_known("model", request.model, models)
    _check_known("drafter", request.drafter, drafters)
    _check_choice("draft_prefill", request.draft_prefill, [side.value for side in DraftPrefill])
    if not 0 <= request.sample < 1 << 31:
        raise InvalidRequest(f"{request.sample} is no index", field="sample", remedy="count samples from 0")
    if request.deadline_s is not None and not request.deadline_s > 0:
        raise InvalidRequest(f"{request.deadline_s} s are left", field="deadline_s", remedy="give a later deadline")


def _check_prompt(request: GenerateRequest, vocab_size: int, max_context: int) -> None:
    sampling, length = request.sampling, len(request.prompt_ids)
    if not length:
        raise InvalidRequest("the prompt is empty", field="prompt_ids", remedy="send at least one token")
    if sampling.max_tokens <= 0:
        raise _outside("max_tokens", sampling.max_tokens, "at least 1")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens + request.replayed:  # it counts what was replayed, too
        raise _outside("min_tokens", sampling.min_tokens, "between 0 and max_tokens")
    if length + sampling.max_tokens > max_context:
        message = f"{length} prompt tokens + max_tokens {sampling.max_tokens} are beyond the context of {max_context}"
        if (room := max_context - length) > 0:
            raise InvalidRequest(message, field="sampling.max_tokens", remedy=f"ask for at most {room} tokens")
        raise InvalidRequest(message, field="prompt_ids", remedy=f"shorten the prompt below {max_context} tokens")
    if not 0 <= request.replayed < length:
        remedy = "leave a prompt before them"
        raise InvalidRequest(f"{request.replayed} of {length} ids", field="replayed", remedy=remedy)
    _check_ids("prompt_ids", request.prompt_ids, vocab_size)


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    if not (params.temperature == 0 or MIN_TEMPERATURE <= params.temperature <= MAX_TEMPERATURE):
        raise _outside("temperature", params.temperature, f"0 (greedy), or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}")
    if not 0 < params.top_p <= 1:
        raise _outside("top_p", params.top_p, "above 0 and at most 1 (1: off)")
    if not 0 <= params.min_p < 1:
        raise _outside("min_p", params.min_p, "at least 0 (off) and below 1")
    if params.top_k < 0:
        raise _outside("top_k", params.top_k, "0 (off) or more")
    if not 0 < params.repetition_penalty <= MAX_REPETITION:
        raise _outside("repetition_penalty", params.repetition_penalty, f"above 0, at most {MAX_REPETITION:g} (1: off)")
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(getattr(params, name)) <= MAX_PENALTY:
            raise _outside(name, getattr(params, name), f"between -{MAX_PENALTY:g} and {MAX_PENALTY:g} (0: off)")
    if params.seed is not None and not 0 <= params.seed < 1 << 64:
        raise _outside("seed", params.seed, "an unsigned 64-bit number")
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise _outside("logprobs", params.logprobs, f"between 0 and {MAX_LOGPROBS}")
    _check_choice("sampling.verify", params.verify, [mode.value for mode in Verify])
    if params.verify == Verify.GREEDY and params.temperature > 0:
        raise InvalidRequest(f"greedy at temperature {params.temperature}", field="sampling.verify",
                             remedy="use temperature 0, or coupled, rejection or block")
    _check_id_lists(params, vocab_size)
    _check_stop_strings(params.stop_strings)
    _check_structure(params)


def _check_id_lists(params: SamplingParams, vocab_size: int) -> None:
    biased = [token for token, _ in params.logit_bias]
    for name, ids in (
        ("stop_ids", params.stop_ids),
        ("allowed_ids", params.allowed_ids),
        ("banned_ids", params.banned_ids),
        ("logit_bias", biased),
    ):
        _check_ids(f"sampling.{name}", ids, vocab_size)
    if len(params.stop_ids) > MAX_STOP_IDS:
        raise _outside("stop_ids", len(params.stop_ids), f"at most {MAX_STOP_IDS} ids")
    if len(biased) > MAX_BIASES or len(set(biased)) < len(biased):
        raise _outside("logit_bias", len(biased), f"at most {MAX_BIASES} entries, one for each token id")
    for token, bias in params.logit_bias:
        if not (math.isfinite(bias) and abs(bias) <= MAX_BIAS):
            raise _outside("logit_bias", f"{bias} for token {token}", f"between -{MAX_BIAS:g} and {MAX_BIAS:g}")
    banned = set(params.banned_ids)
    if banned.issuperset(params.allowed_ids) if params.allowed_ids else len(banned) >= vocab_size:
        remedy = "leave one token that may be chosen"
        raise InvalidRequest("no token is left", field="sampling.banned_ids", remedy=remedy)


def _check_stop_strings(strings: Sequence[str]) -> None:
    if len(strings) > MAX_STOP_STRINGS:
        raise _outside("stop_strings", len(strings), f"at most {MAX_STOP_STRINGS} strings")
    for text in strings:
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise _outside("stop_strings", f"{len(text)} characters", f"1 to {MAX_STOP_CHARACTERS} characters each")


def _check_structure(params: SamplingParams) -> None:
    """What can be said without compiling it (``pdspec.grammar`` does the rest)."""
    asked = [name for name in ("json_schema", "regex", "choice") if getattr(params, name)]
    if not asked:
        return
    if len(asked) > 1:
        raise InvalidRequest(f"beside {asked[0]}", field=f"sampling.{asked[1]}", remedy="ask for one structure")
    if params.ignore_eos:
        remedy = "leave ignore_eos out: a structured answer is over when it is complete"
        raise InvalidRequest("of a structured answer", field="sampling.ignore_eos", remedy=remedy)
    if len(params.json_schema) > MAX_SCHEMA or len(params.regex) > MAX_REGEX:
        limit = f"{MAX_SCHEMA} characters of json_schema or {MAX_REGEX} of regex"
        raise InvalidRequest("too long", field=f"sampling.{asked[0]}", remedy=f"give at most {limit}")
    if len(params.choice) > MAX_CHOICES or not all(1 <= len(text) <= MAX_CHOICE for text in params.choice):
        remedy = f"give at most {MAX_CHOICES} texts of 1 to {MAX_CHOICE} characters"
        raise InvalidRequest("an empty text, or too much", field="sampling.choice", remedy=remedy)


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        index, token = next((index, token) for index, token in enumerate(ids) if not 0 <= token < vocab_size)
        message = f"token id {token} at index {index} is outside the vocabulary"
        raise InvalidRequest(message, field=field, remedy=f"send ids from 0 to {vocab_size - 1}")


def _check_known(field: str, name: str, known: Collection[str]) -> None:
    if name and name not in known:
        remedy = f"leave it empty or choose one of: {', '.join(sorted(known))}" if known else "leave it empty"
        raise UnknownName(f"no {field} {name!r} is deployed", field=field, remedy=remedy)


def _check_choice(field: str, name: str, choices: Sequence[str]) -> None:
    if name and name not in choices:
        raise InvalidRequest(f"unknown value {name!r}", field=field, remedy=f"choose one of: {', '.join(choices)}")


def _outside(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{value} is not allowed", field=f"sampling.{name}", remedy=f"give {allowed}")
