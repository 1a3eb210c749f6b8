"""What is asked in a cell: prompts as chats, of one turn or more. Equal cells ask equal things; request n has seed + n.

The turns of a conversation stand next to each other. A later one has the answers before it as text, as a chat's client
sends them back.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from pdspec.config import WorkerConfig
from pdspec.model.tokenizer import Tokenizer, load_tokenizer
from pdspec.prompts import Prompt
from pdspec.study.cells.chats import follow_up, long_texts
from pdspec.study.cells.client import Asked
from pdspec.study.cells.grid import Cell
from pdspec.study.cells.loads import of_trace, parse_load
from pdspec.types import SamplingParams, UserRequest

_WARM_TOKENS = 8
Chat = tuple[tuple[str, str], ...]  # (role, content) of each message


class Chats:
    """For deployments that tokenize themselves: text. Of a trace they take moments and lengths of answers.
    ``tokenizer`` is needed where prompts are to have ``prompt_tokens`` (0: as they are). Raises ConfigError."""

    def __init__(
        self, prompts: Sequence[Prompt], *, tokenizer: Tokenizer | None = None, prompt_tokens: int = 0
    ) -> None:
        self.prompts = prompts
        self.texts = [prompt.text for prompt in prompts]
        if tokenizer is not None and prompt_tokens:
            self.texts = long_texts(prompts, tokenizer, prompt_tokens)

    def of(self, cell: Cell) -> list[Asked]:
        """The first turns of a cell's conversations, in order. A trace brings the lengths of answers, too, up to
        ``max_tokens``. Prefix caches know nothing of other cells: each call has a salt of its own."""
        load, salt, count = parse_load(cell.load), _salt(cell), cell.requests // cell.turns
        traced = of_trace(load, count) if load.kind == "trace" else None
        found = []
        for number in range(count):
            tokens, length = cell.max_tokens, 0
            if traced:
                tokens, length = max(2, min(tokens, traced[number].output)), traced[number].prompt
            found.append(self._first(cell, number, tokens, length, salt))
        return found

    def warming(self, cell: Cell) -> list[Asked]:
        """One short answer."""
        return [replace(self._first(cell, 0, _WARM_TOKENS, 0, _salt(cell)), then=None)]

    def _first(self, cell: Cell, number: int, tokens: int, length: int, salt: str) -> Asked:
        place = number // cell.samples % len(self.prompts)
        return self._turn(cell, number, (("user", self.texts[place]),), tokens, length, salt)

    def _turn(self, cell: Cell, number: int, chat: Chat, tokens: int, length: int, salt: str) -> Asked:
        """The turn of conversation ``number`` that ``chat`` asks for."""
        turn, place = len(chat) // 2 + 1, number // cell.samples % len(self.prompts)
        index, prompt = number * cell.turns + turn - 1, self.prompts[place]
        params = SamplingParams(
            temperature=cell.temperature, top_p=cell.top_p, max_tokens=tokens, ignore_eos=cell.ignore_eos,
            seed=cell.seed + index,
        )  # fmt: skip

        def then(answer: str) -> Asked:
            said = (*chat, ("assistant", answer), ("user", follow_up(prompt, turn + 1)))
            return self._turn(cell, number, said, tokens, 0, salt)

        about = {
            "index": index, "prompt": prompt.id, "category": prompt.category, "seed": params.seed,
            "sample": number % cell.samples, "turn": turn,
        }  # fmt: skip
        request = replace(self._request(cell, chat, place, length), sampling=params, cache_salt=salt)
        return Asked(request=request, about=about, then=then if turn < cell.turns else None)

    def _request(self, cell: Cell, chat: Chat, place: int, length: int) -> UserRequest:
        drafter = "" if cell.drafter == "served" else cell.drafter
        return UserRequest(chat=chat, model=cell.model, drafter=drafter, tree=cell.tree)


class Requests(Chats):
    """For processes of our own: token ids. A trace brings the lengths of prompts, too: they are the set's prompts, one
    behind the other, cut."""

    def __init__(self, config: WorkerConfig, prompts: Sequence[Prompt], *, prompt_tokens: int = 0) -> None:
        self._tokenizer = load_tokenizer(config.model, config.cache_dir or None)
        super().__init__(prompts, tokenizer=self._tokenizer, prompt_tokens=prompt_tokens)
        self.ids = [self._tokens((("user", text),)) for text in self.texts]

    def _request(self, cell: Cell, chat: Chat, place: int, length: int) -> UserRequest:
        ids = self.ids[place] if len(chat) == 1 else self._tokens(chat)
        ids = self._long(place, length) if length else ids
        return UserRequest(prompt_ids=ids, drafter=cell.drafter, tree=cell.tree, handoff=cell.handoff)

    def _tokens(self, chat: Chat) -> tuple[int, ...]:
        return tuple(self._tokenizer.apply_chat([{"role": role, "content": content} for role, content in chat]))

    def _long(self, place: int, tokens: int) -> tuple[int, ...]:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += self.ids[place % len(self.ids)]
            place += 1
        return tuple(ids[:tokens])


def _salt(cell: Cell) -> str:
    return f"{cell.id}-{secrets.token_hex(4)}"
