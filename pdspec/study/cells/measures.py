"""What the rows of one cell's requests say: pure functions of them. Times in milliseconds, rates per second.

A percentile needs samples: P99 is None below 100 of them. A message of an answer brings the tokens of one
verification; ``itl`` is the time between messages, ``tpot`` the mean time per token of an answer after its first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pdspec.repetition import repeated_marks, repeated_share

Row = Mapping[str, Any]
P99_SAMPLES = 100
PHASES = ("draft", "forward", "verify")  # of a decode step, as workers call their clocks
BIN = 64  # tokens of an answer that one point of ``along`` stands for


def measures(
    rows: Sequence[Row], spent: Row | None = None, *, ttft_ms: float, tpot_ms: float, price_per_hour: float
) -> dict[str, Any]:
    """One row of ``cells.parquet``, without the cell's own values. ``spent`` is what the cell took as a whole, where it
    is known: seconds of the decode workers' phases (``clocks``), joules by counter (``joules``). ``ttft_ms`` and
    ``tpot_ms`` are the goals of a good request; a refused request is none, and has no times."""
    done, spent = [row for row in rows if not row["error"]], spent or {}
    tokens, span = sum(row["output_tokens"] for row in done), span_s(done)
    good = [row for row in done if row["ttft_ms"] <= ttft_ms and tpot(row) <= tpot_ms]
    return {
        "rows": len(rows), "refused": len(rows) - len(done), "output_tokens": tokens, "span_s": span,
        **spread("ttft_ms", (row["ttft_ms"] for row in done)), **spread("itl_ms", gaps(done)),
        **spread("tpot_ms", map(tpot, done)), **spread("e2e_ms", (row["total_ms"] for row in done)),
        **spread("transfer_exposed_ms", (row["transfer_exposed_ms"] for row in done)),
        "tokens_per_second": tokens / span if span else 0.0,
        "requests_per_second": len(done) / span if span else 0.0,
        "good_share": len(good) / len(rows) if rows else 0.0,
        "goodput_requests_per_second": len(good) / span if span else 0.0,
        "goodput_tokens_per_second": sum(row["output_tokens"] for row in good) / span if span else 0.0,
        "cost_per_million_tokens": cost(price_per_hour, tokens, span),
        "kv_bytes": sum(row["kv_bytes"] for row in done), "draft_kv_bytes": sum(row["draft_kv_bytes"] for row in done),
        **acceptance(done), **by_turn(done), **split(spent.get("clocks"), span),
        **energy(spent.get("joules") or {}, tokens),
    }  # fmt: skip


def by_turn(rows: Sequence[Row]) -> dict[str, Any]:
    """Times to the first token of first turns and of later ones, and the share of their prompts that was cached."""
    first, later = ([row for row in rows if (row.get("turn", 1) > 1) == behind] for behind in (False, True))
    return {
        **spread("ttft_ms_turn_1", (row["ttft_ms"] for row in first)),
        **spread("ttft_ms_later_turns", (row["ttft_ms"] for row in later)),
        "cached_share": cached_share(rows), "cached_share_later_turns": cached_share(later),
    }  # fmt: skip


def cached_share(rows: Iterable[Row]) -> float | None:
    """Prompt tokens that whoever prefilled did not compute, of all; None where the rows do not say."""
    told = [row for row in rows if "cached_tokens" in row and row["prompt_tokens"]]
    tokens = sum(row["prompt_tokens"] for row in told)
    apart = ("cached_tokens", "prefill_cached_tokens")
    cached = sum(row[apart[row["prefill_worker"] != row["decode_worker"]]] for row in told)
    return cached / tokens if tokens else None


def split(clocks: Row | None, span: float) -> dict[str, float | None]:
    """Shares of the decode steps' time (they add up to 1): drafting, the target's forward, the rest; and the share of
    ``span`` [s] during which decode workers were in a step, on average. None without ``clocks``."""
    whole = sum(clocks[phase] for phase in PHASES) if clocks else 0.0
    if not clocks or not whole or not span:
        return dict.fromkeys(("draft_share", "verify_share", "other_share", "busy_share"))
    return {
        "draft_share": clocks["draft"] / whole, "verify_share": clocks["forward"] / whole,
        "other_share": clocks["verify"] / whole, "busy_share": whole / (clocks["workers"] * span),
    }  # fmt: skip


def energy(joules: Mapping[str, float], tokens: int) -> dict[str, Any]:
    """Of all counters, and per output token; None where the machine reports none."""
    whole = sum(joules.values()) if joules else None
    each = whole / tokens if whole is not None and tokens else None
    return {"joules": whole, "joules_per_output_token": each, "energy_counters": ", ".join(joules)}


def spread(name: str, values: Iterable[float]) -> dict[str, float | int | None]:
    """P50, P90 and P99 of ``values`` and how many there are."""
    ordered = sorted(values)
    return {
        f"{name}_p50": at(ordered, 0.5), f"{name}_p90": at(ordered, 0.9),
        f"{name}_p99": at(ordered, 0.99) if len(ordered) >= P99_SAMPLES else None, f"{name}_samples": len(ordered),
    }  # fmt: skip


def at(ordered: Sequence[float], share: float) -> float | None:
    """The least value that ``share`` of all do not exceed; None of no values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def span_s(rows: Sequence[Row]) -> float:
    """From the first request to the last token."""
    if not rows:
        return 0.0
    return max(row["asked_s"] + row["total_ms"] / 1e3 for row in rows) - min(row["asked_s"] for row in rows)


def gaps(rows: Iterable[Row]) -> list[float]:
    """Between the messages of each answer."""
    return [later - before for row in rows for before, later in pairwise(row["piece_ms"])]


def tpot(row: Row) -> float:
    """Of one answer; 0 for a single token."""
    later = row["output_tokens"] - 1
    return (row["total_ms"] - row["ttft_ms"]) / later if later else 0.0


def cost(price_per_hour: float, tokens: int, span: float) -> float | None:
    """Of a million output tokens; None without a price or a token."""
    return price_per_hour * span / 3600 / tokens * 1e6 if price_per_hour and tokens else None


def acceptance(rows: Sequence[Row]) -> dict[str, Any]:
    """Tokens per verification over all, per position of the draft, along the answers, and for verifications that begin
    outside repeated 8-grams: a drafter that copies shines on repetition."""
    verifications = sum(row["verifications"] for row in rows)
    later = sum(row["output_tokens"] - 1 for row in rows)
    answers = [row["token_ids"] for row in rows if row["token_ids"]]
    drafted, accepted = (sum(row[name] for row in rows) for name in ("drafted_tokens", "accepted_tokens"))
    steps = [step for row in rows for step in verified(row)]
    fresh = [tokens for _, tokens, repeated in steps if not repeated]
    return {
        "acceptance_length": later / verifications if verifications else None,
        "accepted_share": accepted / drafted if drafted else None,
        "acceptance_per_position": per_position(rows),
        "acceptance_along": along(steps),
        "repeated_8gram_share": repeated_share(answers) if answers else None,
        "acceptance_length_not_repeated": sum(fresh) / len(fresh) if fresh else None,
        "verifications": verifications, "verifications_not_repeated": len(fresh),
    }  # fmt: skip


def verified(row: Row) -> list[tuple[int, int, bool]]:
    """Each verification of an answer: where its tokens begin, how many they are, and whether the first of them stands
    inside a repeated 8-gram. The answer's first token comes from prefill."""
    marks, found, place = repeated_marks(row["token_ids"]), [], 0
    for number, tokens in enumerate(row["piece_tokens"]):
        if number:
            found.append((place, tokens, marks[place]))
        place += tokens
    return found


def along(steps: Iterable[tuple[int, int, bool]]) -> list[float | None]:
    """Tokens per verification of those that begin in the answer's first ``BIN`` tokens, the next, ..."""
    sums: dict[int, list[int]] = {}
    for place, tokens, _ in steps:
        sums.setdefault(place // BIN, []).append(tokens)
    return [sum(sums[n]) / len(sums[n]) if n in sums else None for n in range(max(sums, default=-1) + 1)]


def per_position(rows: Sequence[Row]) -> list[float]:
    """[d]: how often the draft at depth d was accepted where it was reached."""
    depth = max((len(row["reached_per_position"]) for row in rows), default=0)
    totals = [
        [sum(row[name][d] for row in rows if d < len(row[name])) for d in range(depth)]
        for name in ("accepted_per_position", "reached_per_position")
    ]
    return [taken / reached if reached else 0.0 for taken, reached in zip(*totals, strict=True)]
