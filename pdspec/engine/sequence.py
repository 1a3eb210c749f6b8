"""One answer being written on the decode side: what the steps know of it, and what they count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdspec.engine.outlook import Outlook
from pdspec.engine.prefix import Prefix
from pdspec.sampling import History, stopping_ids
from pdspec.spec.protocol import Draft, DraftContext, Drafter
from pdspec.spec.tree import depths
from pdspec.types import FinishReason, GenerateRequest, GenerationStats, TokenChunk, TokenLogprob


@dataclass(kw_only=True, eq=False)
class DecodeSequence:
    """One answer being written. ``ctx.token_ids`` ends with the root, whose KV row comes with the next step."""

    request: GenerateRequest
    ctx: DraftContext
    drafter: Drafter
    history: History  # includes the root
    num_output: int = 1
    finish: FinishReason | None = None
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    first_accepted: int = 0
    accepted_at: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    reached_at: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    seconds: float = 0.0
    prefix: Prefix | None = None
    outlook: Outlook = field(default_factory=Outlook)

    @property
    def num_rows(self) -> int:
        """Committed target KV rows; the root's slot."""
        return self.ctx.root_position

    @property
    def remaining(self) -> int:
        """Tokens that may still be put out."""
        return self.request.sampling.max_tokens - self.num_output

    def stats(self) -> GenerationStats:
        """What is known on the decode side."""
        depth = max([0, *self.reached_at]) + 1 if self.reached_at else 0
        return GenerationStats(
            prompt_tokens=len(self.request.prompt_ids),
            output_tokens=self.num_output,
            verifications=self.verifications,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            first_draft_accepted=self.first_accepted,
            accepted_per_position=tuple(self.accepted_at[d] for d in range(depth)),
            reached_per_position=tuple(self.reached_at[d] for d in range(depth)),
            drafter=self.drafter.name,
            decode_ms=1e3 * self.seconds,
        )

    def tally(self, draft: Draft, accepted: int) -> None:
        """Count one verification of ``draft``."""
        deepest = int(depths(draft.parents).max(initial=0))
        for depth in range(min(accepted + 1, deepest)):
            self.reached_at[depth] += 1
            self.accepted_at[depth] += depth < accepted
        if self.verifications == 0:
            self.first_accepted = accepted
        self.verifications += 1
        self.drafted += draft.num_nodes
        self.accepted += accepted


def first_chunk(sequence: DecodeSequence, logprob: TokenLogprob | None, end_ids: Sequence[int]) -> TokenChunk:
    """The chunk of t_n alone; sets ``finish`` where it ends the answer."""
    token = sequence.ctx.token_ids[-1]
    if token in stopping_ids(sequence.request.sampling, end_ids):
        sequence.finish = FinishReason.STOP
    elif sequence.remaining <= 0:
        sequence.finish = FinishReason.LENGTH
    return TokenChunk(
        request_id=sequence.request.request_id,
        start=0,
        token_ids=(token,),
        logprobs=(logprob,) if logprob else (),
        finish_reason=sequence.finish,
        stop_match=str(token) if sequence.finish is FinishReason.STOP else "",
        stats=sequence.stats() if sequence.finish else None,
    )
