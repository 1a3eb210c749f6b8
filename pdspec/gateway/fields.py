"""Reading a JSON object with types: each wrong field is an InvalidRequest that names it, and so is one that nobody
read: what has no effect is refused, never passed over."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pdspec.errors import InvalidRequest


class Fields:
    """``values`` and where they stand (``messages[0]``). A field whose value is null counts as left out."""

    def __init__(self, values: Any, where: str = "") -> None:
        if not isinstance(values, Mapping):
            raise InvalidRequest("not a JSON object", field=where or "body", remedy="send an object")
        self._values, self._where = values, where
        self._read: set[str] = set()

    def name(self, key: str) -> str:
        """``key`` as errors call it."""
        return f"{self._where}.{key}" if self._where else key

    def any(self, key: str) -> Any:
        """The value as it is, None where it is left out."""
        self._read.add(key)
        return self._values.get(key)

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self.any(key)
        return default if value is None else self._typed(key, value, str, "a string")

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.any(key)
        return default if value is None else self._typed(key, value, bool, "true or false")

    def integer(self, key: str) -> int | None:
        """A whole number."""
        value = self.any(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.any(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        return float(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A string or a list of strings."""
        value = self.any(key)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(key, "a string or a list of strings")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self.any(key)
        if value is None:
            return ()
        if not is_integers(value):
            raise self._wrong(key, "a list of whole numbers")
        return tuple(value)

    def inner(self, key: str) -> Fields | None:
        """An object."""
        value = self.any(key)
        return None if value is None else Fields(value, self.name(key))

    def harmless(self, key: str, *values: Any) -> None:
        """A field of OpenAI's that has no effect here: taken where it asks for what is done anyway (``values``; any
        value without them), else refused."""
        value = self.any(key)
        if value is not None and values and value not in values:
            remedy = f"leave it out, or give {values[0]!r}"
            raise InvalidRequest("not supported here", field=self.name(key), remedy=remedy)

    def end(self, known: frozenset[str] | set[str] = frozenset()) -> None:
        """Raises InvalidRequest for the first field that was not read."""
        for key in self._values:
            if key in self._read or self._values[key] is None:
                continue
            near = difflib.get_close_matches(str(key), self._read | known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "leave it out; docs/http.md lists what is taken"
            raise InvalidRequest("unknown field", field=self.name(str(key)), remedy=remedy)

    def _typed(self, key: str, value: Any, kind: type, text: str) -> Any:
        if not isinstance(value, kind):
            raise self._wrong(key, text)
        return value

    def _wrong(self, key: str, text: str) -> InvalidRequest:
        return InvalidRequest(f"not {text}", field=self.name(key), remedy=f"give {text}")


def is_integers(value: Any) -> bool:
    """Whether it is a list of whole numbers."""
    return isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
