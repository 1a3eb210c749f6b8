"""Stop strings are found wherever tokens split them, and nothing of them is ever sent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdspec.answer_text import AnswerText


class Letters:
    """A tokenizer of one character per id."""

    def push(self, ids) -> str:  # type: ignore[no-untyped-def]
        return "".join(map(chr, ids))

    def flush(self) -> str:
        return ""


def run(text: str, stops: tuple[str, ...], sizes: list[int], min_tokens: int = 0) -> tuple[str, int, str]:
    """(text that went out, tokens kept, stop match) of an answer sent in chunks of the given sizes."""
    answer, out, kept, at = AnswerText(Letters(), stop_strings=stops, min_tokens=min_tokens), "", 0, 0
    while at < len(text):
        size = sizes[at % len(sizes)] if sizes else 1
        piece = answer.push([ord(letter) for letter in text[at : at + size]])
        out, kept, at = out + piece.text, kept + piece.num_tokens, at + size
        if piece.stop_match:
            return out, kept, piece.stop_match
    return out + answer.flush(), kept, ""


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    st.lists(st.integers(1, 5), max_size=4),
)
def test_equals_a_search_in_the_whole_text(text: str, stops: tuple[str, ...], sizes: list[int]) -> None:
    out, kept, match = run(text, stops, sizes)
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert (out, kept, match) == (text, len(text), "")
        return
    end = min(ends)[0]  # the first token that completes any stop string ends the answer
    begin = min(begin for stop_end, begin, _ in ends if stop_end == end)
    assert (out, kept) == (text[:begin], end) and text[begin:end].endswith(match) and match in stops


def test_text_is_held_back_only_as_long_as_needed() -> None:
    answer = AnswerText(Letters(), stop_strings=("END",))
    assert answer.push([ord(letter) for letter in "abE"]).text == "ab"
    assert answer.push([ord("x")]).text == "Ex"
    assert answer.push([ord("E"), ord("N")]).text == ""
    assert answer.flush() == "EN"


def test_stop_strings_wait_for_min_tokens() -> None:
    assert run("aXbXc", ("X",), [1], min_tokens=3) == ("aXb", 4, "X")
    assert run("aX", ("X",), [1], min_tokens=2) == ("a", 2, "X")


def test_without_stop_strings_nothing_is_held() -> None:
    assert run("anything", (), [3]) == ("anything", 8, "")
