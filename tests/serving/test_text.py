"""Text of a response, piece by piece."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data import chat
from distill.serving.text import TextStream
from tests.support.paths import ROOT

TOKENIZER = chat.load_tokenizer(ROOT / "assets" / "teacher")
assert TOKENIZER is not None
TEXTS = ("日本語 ", "é", "🙂", "a\u0301b", "</think>\n", "<|im_end|>", "ab", "\ufffd")
IDS = st.lists(
    # Mostly single bytes, of which several make a character, or none does.
    st.one_of(st.integers(0, 511), *[st.sampled_from(chat.encode(TOKENIZER, x)) for x in TEXTS]),
    max_size=60,
)
CUTS = st.lists(st.integers(0, 60), max_size=8)


def read(ids: list[int], cuts: list[int], stops: list[str]) -> tuple[TextStream, list[str]]:
    stream, places = TextStream(TOKENIZER, stops), sorted({min(x, len(ids)) for x in cuts})
    bounds = [0, *places, len(ids)]
    pieces = [
        stream.feed(ids[start:end], is_last=end == len(ids) and number == len(bounds) - 2)
        for number, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
    return stream, pieces


@settings(max_examples=300, deadline=None)
@given(ids=IDS, cuts=CUTS)
def test_pieces_are_the_whole_text(ids: list[int], cuts: list[int]) -> None:
    _, pieces = read(ids, cuts, [])
    assert TOKENIZER is not None
    assert "".join(pieces) == chat.decode(TOKENIZER, ids)


@settings(max_examples=300, deadline=None)
@given(
    ids=IDS, cuts=CUTS, stops=st.lists(st.sampled_from(["ab", "b日", "é", "🙂", "a"]), min_size=1)
)
def test_nothing_of_a_stop_string_is_sent(
    ids: list[int], cuts: list[int], stops: list[str]
) -> None:
    assert TOKENIZER is not None
    stream, pieces = read(ids, cuts, stops)
    matcher, text = chat.StopStringMatcher(TOKENIZER, stops), "".join(pieces)
    count = matcher.feed(ids)
    assert stream.stop_index == count
    assert text == matcher.cut_text(chat.decode(TOKENIZER, ids[:count]))
    assert not any(stop in text for stop in stops)


def test_a_character_is_sent_whole() -> None:
    assert TOKENIZER is not None
    ids, stream = chat.encode(TOKENIZER, "🙂é!"), TextStream(TOKENIZER, [])
    assert len(ids) > 4
    pieces = [stream.feed([i]) for i in ids]
    assert "".join(pieces) == "🙂é!" and not any("\ufffd" in piece for piece in pieces)
    assert {len(piece) for piece in pieces} == {0, 1}


def test_many_broken_bytes_are_read_in_little_time() -> None:
    assert TOKENIZER is not None
    (first, *_) = chat.encode(TOKENIZER, "🙂")
    stream = TextStream(TOKENIZER, [])
    pieces = [stream.feed([first]) for _ in range(5000)]
    assert "".join(pieces) + stream.feed([], is_last=True) == "\ufffd" * 5000
