"""``transformers`` as the plain baseline: the same weights, SDPA attention, greedy ``generate`` with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from pdspec.model.files import resolve
from pdspec.model.reference import reference_model


class TransformersPeer:
    """A warm model in this process, run with ``threads`` torch threads."""

    def __init__(self, model: str, dtype: str, threads: int, cache_dir: str | None = None) -> None:
        self.threads = threads
        torch.set_num_threads(threads)
        self.model = reference_model(resolve(model, cache_dir), dtype)
        self.generate(range(5, 20), 4)

    def generate(self, prompt_ids: Sequence[int], max_tokens: int) -> tuple[list[int], float]:
        """Greedy tokens, exactly ``max_tokens`` of them, and the seconds per token after the first."""
        ids = torch.tensor([list(prompt_ids)])
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            first = self._timed(ids, 1)
            began = time.perf_counter()
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=max_tokens,
                max_new_tokens=max_tokens, use_cache=True, pad_token_id=0,
            )  # fmt: skip
            seconds = time.perf_counter() - began
        return out[0, ids.shape[1] :].tolist(), (seconds - first) / max(1, max_tokens - 1)

    def _timed(self, ids: torch.Tensor, tokens: int) -> float:
        began = time.perf_counter()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
        )
        return time.perf_counter() - began

    def prefill_seconds(self, prompt_ids: Sequence[int]) -> float:
        """One forward over the prompt that fills a KV cache, logits of the last row only."""
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            began = time.perf_counter()
            self.model(torch.tensor([list(prompt_ids)]), use_cache=True, logits_to_keep=1)
            return time.perf_counter() - began
