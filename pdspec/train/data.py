"""Text that the target writes itself: prompts from files, and prompts it makes up by writing the user's turn.

A small continuous-batching loop over the project's own runner. Sample i depends on (seed, i) alone (the CPU kernels
are row-invariant), so a killed run continues where it stopped; user turns that occurred before are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import pages_for
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch
from pdspec.model.loader import load_weights, resolve
from pdspec.model.ops import make_ops
from pdspec.model.runner import Runner
from pdspec.model.tokenizer import Tokenizer, load_tokenizer
from pdspec.spec.eagle3.config import default_fused_layers
from pdspec.train.draw import sample_tokens
from pdspec.train.plan import DataConfig, Plan, plan, prompt_key
from pdspec.train.store import Sample, TokenStore

MARK = "\u241eUSER\u241e"
PAGE_SIZE = 16
HOPELESS = 200  # user turns dropped in a row before generation gives up


@dataclass(frozen=True)
class Target:
    """What generation needs of a model."""

    runner: Runner
    tokenizer: Tokenizer
    name: str
    content_hash: str
    tokenizer_hash: str


def load_target(model: str, *, dtype: str = "bfloat16", threads: int = 0, cache_dir: str | None = None) -> Target:
    """The target with packed weights. Raises what ``resolve`` raises."""
    files = resolve(model, cache_dir)
    runner = Runner(files.config, load_weights(files, dtype), ops=make_ops(threads=threads), dtype=dtype)
    return Target(runner, load_tokenizer(files), model, files.content_hash, files.tokenizer_hash)


@dataclass(kw_only=True)
class _Slot:
    """One running conversation."""

    plan: Plan
    tokens: list[int]
    rng: np.random.Generator
    prompt_tokens: int  # 0 while the user's turn is being written
    key: str = ""
    computed: int = 0
    best: list[np.ndarray] = field(default_factory=list)
    hidden: list[np.ndarray] = field(default_factory=list)


class Generator:
    """Runs a plan with ``config.batch`` conversations at a time."""

    def __init__(self, config: DataConfig, target: Target) -> None:
        self.config, self.target = config, target
        model = target.runner.config
        self.capture = default_fused_layers(model.num_layers) if config.keep_hidden else ()
        self.max_prompt = min(config.max_prompt, model.max_context // 2)
        self.max_tokens = min(model.max_context, self.max_prompt + config.max_answer)
        before, after = target.tokenizer.render_chat([{"role": "user", "content": MARK}]).split(MARK)
        self.before, self.after = target.tokenizer.encode(before), target.tokenizer.encode(after)
        self.rejected = self._rejected_in_a_row = 0

    def meta(self) -> dict[str, Any]:
        """What a store of these samples is made with."""
        config, hidden = self.config, self.target.runner.config.hidden_size
        return {
            "format": 1,
            "model": self.target.name,
            "content_hash": self.target.content_hash,
            "tokenizer_hash": self.target.tokenizer_hash,
            "dtype": self.target.runner.dtype,
            "seed": config.seed,
            "temperature": config.temperature,
            "user_temperature": config.user_temperature,
            "user_min_p": config.user_min_p,
            "max_answer": config.max_answer,
            "self_share": config.self_share,
            "sources": [[name, len(prompts)] for name, prompts in config.sources],
            "capture": list(self.capture),
            "hidden_row": [len(self.capture) + 1, hidden] if config.keep_hidden else [],
        }

    def run(self, done: set[int], keys: set[str]) -> Iterator[Sample]:
        """Finished samples as they come, in no fixed order. ``done`` are indices to skip, ``keys`` user turns to
        drop; both grow. Ends with the plan, or when the caller stops asking."""
        config, todo = self.config, plan(self.config)
        pages_each = pages_for(self.max_tokens, PAGE_SIZE)
        cache = PagedCache((self.target.runner.group,), config.batch * pages_each, PAGE_SIZE)
        table = np.arange(config.batch * pages_each, dtype=np.int32).reshape(config.batch, pages_each)
        slots: list[_Slot | None] = [None] * config.batch
        exhausted = False
        while True:
            for number, slot in enumerate(slots):
                while slots[number] is None and slot is None and not exhausted:
                    item = next(todo, None)
                    exhausted = item is None
                    if item is not None and item.index not in done:
                        slots[number] = self._open(item, keys)
            running = [(number, slot) for number, slot in enumerate(slots) if slot is not None]
            if not running:
                return
            self._step(running, table, cache)
            for number, slot in running:
                sample = self._advance(slot, keys)
                if sample is not None:
                    done.add(slot.plan.index)
                    slots[number] = None
                    self._count(sample is True)
                    if isinstance(sample, Sample):
                        yield sample

    def _count(self, rejected: bool) -> None:
        self.rejected += rejected
        self._rejected_in_a_row = self._rejected_in_a_row + 1 if rejected else 0
        if self._rejected_in_a_row > HOPELESS:
            raise ConfigError(
                f"{self._rejected_in_a_row} user turns in a row were no use: too long, too short or known",
                field="self_share",
                remedy="give --prompts and --self-share 0: this model cannot ask",
            )

    def _open(self, item: Plan, keys: set[str]) -> _Slot | None:
        rng = np.random.Generator(np.random.PCG64([self.config.seed, item.index]))
        if item.prompt is None:
            return _Slot(plan=item, tokens=list(self.before), rng=rng, prompt_tokens=0)
        key = prompt_key(item.prompt.text)
        ids = self.target.tokenizer.apply_chat([{"role": "user", "content": item.prompt.text}])
        if key in keys or len(ids) > self.max_prompt:
            self.rejected += 1
            return None
        keys.add(key)
        return _Slot(plan=item, tokens=ids, rng=rng, prompt_tokens=len(ids), key=key)

    def _step(self, running: list[tuple[int, _Slot]], table: np.ndarray, cache: PagedCache) -> None:
        """One forward of every token not yet computed, then one new token for each conversation."""
        counts = [len(slot.tokens) - slot.computed for _, slot in running]
        slots = np.concatenate([np.arange(slot.computed, len(slot.tokens), dtype=np.int32) for _, slot in running])
        ends = np.cumsum(counts, dtype=np.int32)
        out = self.target.runner.forward(
            ForwardBatch(
                token_ids=np.concatenate([np.array(slot.tokens[slot.computed :], np.int32) for _, slot in running]),
                positions=slots,
                sequence=np.repeat(np.array([n for n, _ in running], np.int32), counts),
                slots=slots,
                prefix_len=slots + 1,
                ancestors=np.empty((len(slots), 0), np.int32),
                page_table=table,
                logit_rows=ends - 1,
                capture=self.capture,
                want_final=bool(self.capture),
            ),
            cache,
        )
        config = self.config
        answering = [slot.prompt_tokens > 0 for _, slot in running]
        ids, best = sample_tokens(
            out.logits,
            [config.temperature if a else config.user_temperature for a in answering],
            [0.0 if a else config.user_min_p for a in answering],
            [slot.rng.random() for _, slot in running],
        )
        hidden = None
        if out.captured is not None and out.final is not None:
            both = torch.cat((out.captured, out.final[:, None]), 1)
            hidden = both.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        for order, (_, slot) in enumerate(running):
            stop = int(ends[order])
            slot.best.append(np.append(np.full(counts[order] - 1, -1, np.int32), best[order]))
            if hidden is not None:
                slot.hidden.append(hidden[stop - counts[order] : stop])
            slot.computed = len(slot.tokens)
            slot.tokens.append(int(ids[order]))

    def _advance(self, slot: _Slot, keys: set[str]) -> Sample | bool | None:
        """None: goes on. A Sample: finished. True: dropped."""
        if slot.prompt_tokens:
            written = len(slot.tokens) - slot.prompt_tokens
            ended = slot.tokens[-1] in self.target.tokenizer.eos_ids
            full = written >= self.config.max_answer or len(slot.tokens) >= self.max_tokens
            return self._finish(slot) if ended or full else None
        start = len(self.before)
        if slot.tokens[-1] == self.after[0]:
            user = slot.tokens[start:-1]
            slot.key = prompt_key(self.target.tokenizer.decode(user))
            if len(user) < self.config.min_user or slot.key in keys:
                return True
            keys.add(slot.key)
            slot.tokens.extend(self.after[1:])
            slot.prompt_tokens = len(slot.tokens)
            return None
        if len(slot.tokens) - start > self.config.max_user or slot.tokens[-1] in self.target.tokenizer.eos_ids:
            return True
        return None

    def _finish(self, slot: _Slot) -> Sample:
        hidden = None
        if self.capture:
            rows = np.concatenate(slot.hidden)
            hidden = np.concatenate((rows, np.zeros((1, *rows.shape[1:]), np.uint16)))
        return Sample(
            index=slot.plan.index,
            source=slot.plan.source,
            prompt_tokens=slot.prompt_tokens,
            key=slot.key,
            tokens=np.array(slot.tokens, np.int32),
            best=np.append(np.concatenate(slot.best), -1).astype(np.int32),
            hidden=hidden,
        )


def generate(config: DataConfig, target: Target, *, known: Set[str] = frozenset(), show: bool = True) -> TokenStore:
    """Writes until the store holds ``config.tokens`` answer tokens (or the plan ends) and returns it. ``known`` are
    keys of user turns that must not occur, besides those in the store."""
    generator = Generator(config, target)
    store = TokenStore(config.out, generator.meta())
    written = sum(store.answer_tokens().values())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task("writing answers", total=config.tokens, completed=min(written, config.tokens))
        if written >= config.tokens:
            return store
        for sample in generator.run(store.indices, store.keys | known):
            store.append(sample)
            written += len(sample.tokens) - sample.prompt_tokens
            progress.update(task, completed=min(written, config.tokens))
            if written >= config.tokens:
                break
    return store
