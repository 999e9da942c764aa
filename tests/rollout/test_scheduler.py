"""The scheduler by itself: no page leaks, is shared unduly or freed twice; every sequence comes."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.rollout import Sequence
from distill.rollout.scheduler import Scheduler, Slot

LONGEST = 40


@st.composite
def asked(draw):
    """Groups of samples: (prompt tokens, limit of each, tokens that each will draw)."""
    found = []
    for number in range(draw(st.integers(1, 8))):
        prompt = draw(st.integers(1, LONGEST // 2))
        for _ in range(draw(st.integers(1, 5))):
            limit = draw(st.integers(1, LONGEST - prompt))
            found.append((number, prompt, limit, draw(st.integers(1, limit))))
    return found


def pages_of(tokens: int, page: int) -> int:
    return -(-tokens // page)


def check(scheduler: Scheduler, contents: list[dict[int, list[object]]]) -> None:
    """What a page's uses are, and that each seat's tokens are where its pages say."""
    for shard, uses in enumerate(scheduler.page_refs):
        held = Counter(page for seat in scheduler.iter_slots(shard) for page in seat.pages)
        prefix = scheduler._prefix[shard]
        held.update(prefix.pages if prefix else [])
        assert uses == [held[page] for page in range(len(uses))]
        assert sorted(scheduler.free_pages[shard]) == [p for p, n in enumerate(uses) if not n]
        for row, seat in enumerate(scheduler.slots[shard]):
            assert seat is None or (seat.row, seat.shard) == (row, shard)
            if seat and scheduler.pinned:
                assert seat.pages == [row]
        for seat in scheduler.iter_slots(shard):
            for at in range(seat.length):
                page = contents[shard][seat.pages[at // scheduler.page_size]]
                assert page[at % scheduler.page_size] == token(seat.sequence, at)


def token(sequence: Sequence, at: int) -> object:
    """What lies at a place: of a prompt the same for all its samples."""
    prompt = len(sequence.prompt)
    return (tuple(sequence.prompt), at) if at < prompt else (sequence.key, at)


def write(scheduler, contents, seat: Slot, begin: int, end: int) -> None:
    """Nobody else may be looking at what is written, unless it is the same."""
    for at in range(begin, end):
        page = seat.pages[at // scheduler.page_size]
        of = contents[seat.shard].setdefault(page, [None] * scheduler.page_size)
        of[at % scheduler.page_size] = token(seat.sequence, at)


def copied(contents, seat: Slot) -> None:
    if seat.page_copy:
        source, target = seat.page_copy
        assert target in seat.pages and source not in seat.pages
        contents[seat.shard][target] = list(contents[seat.shard][source])


@settings(max_examples=300, deadline=None)
@given(
    asked(),
    st.integers(1, 3),  # shards
    st.integers(1, 4),  # rows of each
    st.sampled_from([1, 2, 3, 8, LONGEST]),  # tokens of a page
    st.integers(0, 12),  # pages beside those of the longest sequence
    st.integers(1, 9),  # steps of a segment
    st.booleans(),
)
def test_a_run(groups, shards, rows, page, more, segment, pinned):
    """Segment after segment until all have ended, with the contents of pages written down."""
    if pinned:
        page, pages = LONGEST, rows
    else:
        pages = pages_of(LONGEST, page) + more
    sequences = [
        Sequence([number] * prompt, (i, i), limit)
        for i, (number, prompt, limit, _) in enumerate(groups)
    ]
    draws = {(i, i): n for i, (*_, n) in enumerate(groups)}
    scheduler = Scheduler(
        sequences,
        shards=shards,
        rows=rows,
        pages=pages,
        page_size=page,
        segment=segment,
        pinned=pinned,
    )
    contents: list[dict[int, list[object]]] = [{} for _ in range(shards)]
    first_seated: list[int] = []
    ended: list[Sequence] = []
    for _ in range(10_000):
        if not scheduler.queue and not any(scheduler.iter_slots()):
            break
        oldest = min((s.number for s in scheduler.iter_slots()), default=None)
        for seat in scheduler.grow_slots():
            assert seat.number != oldest or len(scheduler.slots) > 1
            assert not seat.pages
        numbers = [number for number, _ in scheduler.queue]
        assert numbers == sorted(numbers)
        seats = scheduler.insert_waiting()
        assert [s.number for s in seats] == numbers[: len(seats)]
        first_seated += [s.number for s in seats if s.number not in first_seated]
        for seat in (s for s in seats if s.needs_prefill):
            write(scheduler, contents, seat, 0, seat.length)
        for seat in seats:
            assert seat.length == len(seat.sequence.all_tokens) - 1
            copied(contents, seat)
        check(scheduler, contents)
        assert any(scheduler.iter_slots())
        for seat in list(scheduler.iter_slots()):
            row = seat.sequence
            n = min(segment, draws[row.key] - len(row.tokens))
            assert seat.length + n <= len(seat.pages) * page
            write(scheduler, contents, seat, seat.length, seat.length + n)
            row.tokens += [0] * n
            seat.length += n
        check(scheduler, contents)
        for seat in list(scheduler.iter_slots()):
            if len(seat.sequence.tokens) == draws[seat.sequence.key]:
                seat.sequence.finish_reason = "stop"
                ended.append(seat.sequence)
                scheduler.release_slot(seat)
    else:
        raise AssertionError("it does not end")
    assert first_seated == list(range(len(sequences)))
    assert len(ended) == len({id(s) for s in ended})
    assert sorted(s.key for s in ended) == sorted(s.key for s in sequences)
    assert all(sorted(free) == list(range(pages)) for free in scheduler.free_pages)
    assert not any(any(uses) for uses in scheduler.page_refs)


def test_samples_share_the_pages_of_their_prompt():
    """Four samples of 10 tokens, pages of 4: two whole pages are one for all, the third a copy."""
    sequences = [Sequence([5] * 11, (0, i), 3) for i in range(4)]
    scheduler = Scheduler(sequences, shards=1, rows=4, pages=12, page_size=4, segment=2)
    seats = scheduler.insert_waiting()
    assert [seat.needs_prefill for seat in seats] == [True, False, False, False]
    assert len({tuple(seat.pages[:2]) for seat in seats}) == 1
    assert len({seat.pages[2] for seat in seats}) == 4
    assert [seat.page_copy and seat.page_copy[0] for seat in seats] == [None] + [
        seats[0].pages[2]
    ] * 3
    assert len(scheduler.free_pages[0]) == 12 - 2 - 4


def test_the_youngest_make_room():
    """Two of 4 tokens in a pool of three pages: when both need a second, the second one waits."""
    sequences = [Sequence([i, 1, 2, 3], (0, i), 6) for i in range(2)]
    scheduler = Scheduler(sequences, shards=1, rows=2, pages=3, page_size=4, segment=1)
    first, second = scheduler.insert_waiting()
    for seat in (first, second):
        seat.length += 1
        seat.sequence.tokens.append(7)
    assert scheduler.grow_slots() == [second] and list(scheduler.iter_slots()) == [first]
    assert [s for _, s in scheduler.queue] == [sequences[1]]
    assert len(first.pages) == 2 and not second.pages
    sequences[1].finish_reason = "stop"  # as a stop string that is found late does
    scheduler.release_slot(first)
    assert not scheduler.insert_waiting() and not scheduler.queue


def test_the_last_ones_move_together():
    sequences = [Sequence([i, 1], (0, i), 6) for i in range(8)]
    scheduler = Scheduler(sequences, shards=2, rows=4, pages=4, page_size=8, segment=1, pinned=True)
    seats = scheduler.insert_waiting()
    for seat in seats:
        if seat.row != 2:
            scheduler.release_slot(seat)
    assert scheduler.compact_rows(1) == [[2], [2]]
    assert [(s.row, s.pages, s.shard) for s in scheduler.iter_slots()] == [(0, [0], 0), (0, [0], 1)]
    for seat in list(scheduler.iter_slots()):
        scheduler.release_slot(seat)
    assert scheduler.free_pages == [[0], [0]] and scheduler.page_refs == [[0], [0]]
