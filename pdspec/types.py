"""The values that pass between parts: frozen, standard library only, no tensors.

A request is a value. It is validated once (``validation.py``), stamped with a seed by the router and
never changed afterwards; what changes while it runs lives in the schedulers' ``Sequence`` records.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

# Figures in Status, by ``Route.link``.
LINK_RATE, LINK_LATENCY = "link_bytes_per_second/", "link_latency_seconds/"
LINK_OVERHEAD = "link_overhead_seconds/"


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # an end token, stop id or stop string
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"
    ERROR = "error"


class Handoff(StrEnum):
    """The path of the Prefill stream: straight to the prefill worker, or through the router's relay."""

    DIRECT = "direct"
    RELAY = "relay"


class DraftPrefill(StrEnum):
    """Who runs the drafter over the prompt: the prefill worker (draft KV travels) or the decode worker
    (the hidden rows it reads travel)."""

    PREFILL = "prefill"
    DECODE = "decode"


class Verify(StrEnum):
    """How drafts are judged. All but GREEDY give plain decoding's distribution at any temperature; COUPLED its very
    tokens. At temperature 0 they are one and the same."""

    COUPLED = "coupled"  # the target's token by the noise of its position; whoever foresaw it is accepted
    REJECTION = "rejection"  # accept with min(1, p / q), else draw from what is left (Leviathan et al. 2023)
    BLOCK = "block"  # rejection, a chain judged as a whole (Sun et al. 2024); other trees node by node
    GREEDY = "greedy"  # the best token, refused at a temperature above 0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the target's next token is chosen (validated by ``validation.check_request``).

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``seed`` None lets the
    router draw 64 bits and return them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] = ()  # empty: every id
    banned_ids: tuple[int, ...] = ()
    seed: int | None = None
    max_tokens: int = 128
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; 0: the chosen token's; n: and the n best
    verify: str = Verify.COUPLED.value
    json_schema: str = ""  # the answer is JSON that this schema (JSON itself) allows
    regex: str = ""  # the answer matches it as a whole
    choice: tuple[str, ...] = ()  # the answer is one of these

    @property
    def structured(self) -> bool:
        """Whether a grammar decides which tokens are allowed."""
        return bool(self.json_schema or self.regex or self.choice)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One answer to be written: ``prompt_ids`` are target token ids, never empty."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    model: str = ""  # empty: whatever is deployed
    drafter: str = ""  # empty: the deployment's default
    tree: str = ""  # empty: the drafter's default; "chain(4)", "dynamic(4,4,8)", ...
    draft_prefill: str = ""  # empty: the deployment's default
    sample: int = 0  # index among the n samples of one prompt; part of the noise key
    deadline_s: float | None = None  # remaining seconds, not a clock reading
    trace: bool = False  # report each verification's draft in the chunks
    priority: int = 0  # higher goes first where requests wait, and keeps its pages longest
    cache_salt: str = ""  # prefixes are shared among requests of the same salt alone
    replayed: int = 0  # the last ids of prompt_ids that are output already (a stream moved here after a loss)


@dataclass(frozen=True, kw_only=True)
class UserRequest:
    """One call of Router/Generate as a user makes it: exactly one of ``text`` (no chat template), ``chat``
    ((role, content) pairs) and ``prompt_ids`` is not None. The router turns it into a ``GenerateRequest``."""

    text: str | None = None
    chat: tuple[tuple[str, str], ...] | None = None
    prompt_ids: tuple[int, ...] | None = None
    request_id: str = ""  # empty: the router makes one
    sampling: SamplingParams = SamplingParams()
    model: str = ""
    drafter: str = ""
    tree: str = ""
    draft_prefill: str = ""
    handoff: str = ""  # empty: the deployment's default
    sample: int = 0
    trace: bool = False
    priority: int = 0  # higher goes first where requests wait
    tenant: str = ""  # whose share of a full deployment this request takes; empty: the caller's token or host
    cache_salt: str = ""
    resume_ids: tuple[int, ...] = ()  # tokens of the answer that came before its stream broke; needs the seed
    fit_context: bool = False  # lower max_tokens to what the context leaves behind the prompt


@dataclass(frozen=True, kw_only=True)
class Route:
    """The router's whole decision. Addresses are ``host:port``."""

    decode: str
    prefill: tuple[str, ...]  # in fail-over order; empty: the decode worker prefills
    handoff: Handoff = Handoff.DIRECT
    relay: str = ""  # the relay's address when handoff is RELAY

    def link(self, prefill: str) -> str:
        """The way from the decode worker to ``prefill``, by name: a relay's links fail apart from direct ones."""
        return f"{self.relay}>{prefill}" if self.handoff is Handoff.RELAY else prefill


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log probability of a chosen token and of the best alternatives, after all processors. ``text`` and ``top_texts``
    are the bytes of those tokens, where a router filled them in."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    text: bytes = b""
    top_texts: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What one answer took. Times in milliseconds, sizes in bytes."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    verifications: int = 0  # target forwards that verified a draft (or plain steps)
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    first_draft_accepted: int = 0  # accepted in the first verification after the handoff
    accepted_per_position: tuple[int, ...] = ()  # [d]: verifications that accepted the draft at depth d
    reached_per_position: tuple[int, ...] = ()  # [d]: verifications that had a draft at d and accepted all before
    kv_bytes: int = 0  # target KV moved by the handoff
    draft_kv_bytes: int = 0
    hidden_bytes: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    handoff: str = ""
    drafter: str = ""
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_exposed_ms: float = 0.0
    decode_ms: float = 0.0
    draft_rebuilds: int = 0
    prefill_retries: int = 0
    partial: bool = False  # cut at a stop string or moved by the router: counts it could not see are 0
    cached_tokens: int = 0  # of the prompt, whose KV the decode worker had
    prefill_cached_tokens: int = 0  # of the prompt, that the prefill worker did not compute
    moves: int = 0  # times the stream continued on another decode worker

    @property
    def acceptance_length(self) -> float:
        """Mean output tokens per verification; the first token of an answer comes from prefill."""
        if self.verifications == 0:
            return 0.0
        return (self.output_tokens - 1) / self.verifications


@dataclass(frozen=True, kw_only=True)
class DraftTrace:
    """One verification's draft and how much of it was accepted, for checks and viewers."""

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    accepted: int


@dataclass(frozen=True, kw_only=True)
class TokenChunk:
    """The tokens of one verification (1..k+1), or the first token alone. ``start`` is the index of the
    first of them in the answer, so that a reader can tell a gap or a repeat."""

    request_id: str
    start: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_match: str = ""  # the stop string or id that ended it
    stats: GenerationStats | None = None  # with the finish reason only
    trace: DraftTrace | None = None  # where the request asked for it


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """One kind of KV rows: ``target``, ``draft/eagle3``, ... Row layout ``[k|v][head][dim]``, or, where ``parts`` is 1,
    ``[head][dim]``: latent KV, a vector that keys and values are both made of (DeepSeek's MLA)."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # "bfloat16" | "float32"
    parts: int = 2  # k and v

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.parts * self.num_kv_heads * self.head_dim * (2 if self.dtype == "bfloat16" else 4)


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """What a worker says of itself in Status; the router decides from these alone."""

    worker_id: str
    role: str  # "prefill" | "decode"
    address: str
    model: str
    fingerprint: str  # content fingerprint, hex
    drafters: tuple[str, ...] = ()
    queued: int = 0
    running: int = 0
    free_pages: int = 0
    total_pages: int = 0
    page_size: int = 16
    max_context: int = 0
    vocab_size: int = 0
    steps: int = 0  # step counter: busy, stuck and dead differ
    stepping: int = 0  # sequences that the next step advances
    unreachable: tuple[str, ...] = ()  # ``Route.link`` of prefill workers that could not be reached lately
    draining: bool = False
    seats: int = 0  # answers that it runs at once; 0: it does not say
    overcommit: float = 0.0  # times its KV pool that it promises to them; 0: it does not say
    metrics: dict[str, float] = field(default_factory=dict)
