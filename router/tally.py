"""What the router itself sees of an answer, for the statistics of answers that it cuts or moves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pdspec.types import GenerateRequest, GenerationStats, Route


@dataclass
class Tally:
    """Counts of the chunks of one answer over all its attempts; a chunk is one verification, but for each attempt's
    first, which is the token that came from prefill."""

    verifications: int = 0
    accepted: int = 0
    first_draft_accepted: int | None = None
    moved_verifications: int = 0  # of attempts before the present one
    moved_accepted: int = 0
    moves: int = 0

    def add(self, tokens: int, *, first: bool) -> None:
        """Count a chunk of so many tokens, as the worker sent it."""
        if first or not tokens:
            return
        self.verifications += 1
        self.accepted += tokens - 1
        if self.first_draft_accepted is None:
            self.first_draft_accepted = tokens - 1

    def move(self) -> None:
        """The present attempt failed after tokens went out."""
        self.moved_verifications, self.moved_accepted = self.verifications, self.accepted
        self.moves += 1

    def finish(
        self, stats: GenerationStats | None, request: GenerateRequest, route: Route, *, output_tokens: int, cut: bool
    ) -> GenerationStats:
        """``stats`` of the last attempt made those of the whole answer; ``cut``: they are not its last, so that counts
        are those the router has seen. ``request`` is the original one."""
        names = {"decode_worker": route.decode, "handoff": route.handoff.value, "drafter": request.drafter}
        known = stats or GenerationStats(**names)  # type: ignore[arg-type]
        if cut:
            known = replace(
                known,
                verifications=self.verifications - self.moved_verifications,
                accepted_tokens=self.accepted - self.moved_accepted,
                first_draft_accepted=self.first_draft_accepted or 0,
            )
        whole = replace(
            known,
            prompt_tokens=len(request.prompt_ids),
            output_tokens=output_tokens,
            verifications=known.verifications + self.moved_verifications,
            accepted_tokens=known.accepted_tokens + self.moved_accepted,
            moves=self.moves,
            partial=known.partial or cut or self.moves > 0,
        )
        if self.moves:
            whole = replace(whole, first_draft_accepted=self.first_draft_accepted or 0)
        return whole
