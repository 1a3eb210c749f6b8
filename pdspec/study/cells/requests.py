"""What is asked in a cell: prompts as a chat's first turn. Equal cells ask equal things; request n has seed + n."""

from __future__ import annotations

from collections.abc import Sequence

from pdspec.config import WorkerConfig
from pdspec.model.tokenizer import load_tokenizer
from pdspec.prompts import Prompt
from pdspec.study.cells.client import Asked
from pdspec.study.cells.grid import Cell
from pdspec.study.cells.loads import of_trace, parse_load
from pdspec.types import SamplingParams, UserRequest

_WARM_TOKENS = 8


class Chats:
    """For deployments whose tokenizer is not here: text. Of a trace they take moments and lengths of answers."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def of(self, cell: Cell) -> list[Asked]:
        """The requests of a cell, in order. A trace brings the lengths of answers, too, up to ``max_tokens``."""
        load = parse_load(cell.load)
        traced = of_trace(load, cell.requests) if load.kind == "trace" else None
        found = []
        for index in range(cell.requests):
            place, tokens, length = index // cell.samples % len(self.prompts), cell.max_tokens, 0
            if traced:
                tokens, length = max(2, min(tokens, traced[index].output)), traced[index].prompt
            found.append(self._asked(cell, index, place, tokens, length))
        return found

    def warming(self, cell: Cell) -> list[Asked]:
        """One short answer."""
        return [self._asked(cell, 0, 0, _WARM_TOKENS, 0)]

    def _asked(self, cell: Cell, index: int, place: int, tokens: int, length: int) -> Asked:
        seed, prompt = cell.seed + index, self.prompts[place]
        params = SamplingParams(
            temperature=cell.temperature, top_p=cell.top_p, max_tokens=tokens, ignore_eos=cell.ignore_eos, seed=seed
        )
        about = {
            "index": index, "prompt": prompt.id, "category": prompt.category, "seed": seed,
            "sample": index % cell.samples,
        }  # fmt: skip
        return Asked(request=self._request(cell, place, length, params), about=about)

    def _request(self, cell: Cell, place: int, length: int, params: SamplingParams) -> UserRequest:
        drafter = "" if cell.drafter == "served" else cell.drafter
        chat = (("user", self.prompts[place].text),)
        return UserRequest(chat=chat, model=cell.model, drafter=drafter, tree=cell.tree, sampling=params)


class Requests(Chats):
    """For processes of our own: token ids. A trace brings the lengths of prompts, too: they are the set's prompts, one
    behind the other, cut."""

    def __init__(self, config: WorkerConfig, prompts: Sequence[Prompt]) -> None:
        super().__init__(prompts)
        tokenizer = load_tokenizer(config.model, config.cache_dir or None)
        self.ids = [tuple(tokenizer.apply_chat([{"role": "user", "content": one.text}])) for one in prompts]

    def _request(self, cell: Cell, place: int, length: int, params: SamplingParams) -> UserRequest:
        ids = self._long(place, length) if length else self.ids[place]
        return UserRequest(
            prompt_ids=ids, drafter=cell.drafter, tree=cell.tree, handoff=cell.handoff, sampling=params
        )

    def _long(self, place: int, tokens: int) -> tuple[int, ...]:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += self.ids[place % len(self.ids)]
            place += 1
        return tuple(ids[:tokens])
