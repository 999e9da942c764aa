"""The scheduler alone: no page leaks, is wrongly shared or freed twice; all sequences end once."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.rollout import Sequence
from distill.rollout.scheduler import Scheduler, Slot

LONGEST = 40


@st.composite
def requests(draw):
    """Samples in groups of one prompt: (prompt number, prompt tokens, limit, tokens to draw)."""
    drawn = []
    for number in range(draw(st.integers(1, 8))):
        prompt = draw(st.integers(1, LONGEST // 2))
        for _ in range(draw(st.integers(1, 5))):
            limit = draw(st.integers(1, LONGEST - prompt))
            drawn.append((number, prompt, limit, draw(st.integers(1, limit))))
    return drawn


def count_pages(tokens: int, page: int) -> int:
    return -(-tokens // page)


def check(scheduler: Scheduler, contents: list[dict[int, list[object]]]) -> None:
    """Checks each page's reference count, and that each slot's tokens lie in its pages."""
    for shard, refs in enumerate(scheduler.page_refs):
        used = Counter(page for slot in scheduler.iter_slots(shard) for page in slot.pages)
        prefix = scheduler._prefix[shard]
        used.update(prefix.pages if prefix else [])
        assert refs == [used[page] for page in range(len(refs))]
        assert sorted(scheduler.free_pages[shard]) == [p for p, n in enumerate(refs) if not n]
        for row, slot in enumerate(scheduler.slots[shard]):
            assert slot is None or (slot.row, slot.shard) == (row, shard)
            if slot and scheduler.pinned:
                assert slot.pages == [row]
        for slot in scheduler.iter_slots(shard):
            for i in range(slot.length):
                page = contents[shard][slot.pages[i // scheduler.page_size]]
                assert page[i % scheduler.page_size] == token(slot.sequence, i)


def token(sequence: Sequence, i: int) -> object:
    """Returns an identity of token i; all samples of a prompt share those of the prompt."""
    return (tuple(sequence.prompt) if i < len(sequence.prompt) else sequence.key, i)


def write(scheduler, contents, slot: Slot, begin: int, end: int) -> None:
    """Writes tokens into the slot's pages; `check` then shows that no other slot lost one."""
    for i in range(begin, end):
        page = slot.pages[i // scheduler.page_size]
        tokens = contents[slot.shard].setdefault(page, [None] * scheduler.page_size)
        tokens[i % scheduler.page_size] = token(slot.sequence, i)


def copy_page(contents, slot: Slot) -> None:
    if slot.page_copy:
        source, target = slot.page_copy
        assert target in slot.pages and source not in slot.pages
        contents[slot.shard][target] = list(contents[slot.shard][source])


@settings(max_examples=300, deadline=None)
@given(
    requests(),
    st.integers(1, 3),  # shards
    st.integers(1, 4),  # rows of each
    st.sampled_from([1, 2, 3, 8, LONGEST]),  # tokens of a page
    st.integers(0, 12),  # pages beside those of the longest sequence
    st.integers(1, 9),  # steps of a segment
    st.booleans(),
)
def test_all_sequences_end_once_with_their_tokens_in_their_pages(
    groups, shards, rows, page, more, segment, pinned
):
    """Segments until all have ended, with a record of the contents of pages."""
    if pinned:
        page, pages = LONGEST, rows
    else:
        pages = count_pages(LONGEST, page) + more
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
    first_inserted: list[int] = []
    ended: list[Sequence] = []
    for _ in range(10_000):
        if not scheduler.queue and not any(scheduler.iter_slots()):
            break
        oldest = min((s.number for s in scheduler.iter_slots()), default=None)
        for slot in scheduler.grow_slots():
            assert slot.number != oldest or len(scheduler.slots) > 1
            assert not slot.pages
        numbers = [number for number, _ in scheduler.queue]
        assert numbers == sorted(numbers)
        slots = scheduler.insert_waiting()
        assert [s.number for s in slots] == numbers[: len(slots)]
        first_inserted += [s.number for s in slots if s.number not in first_inserted]
        for slot in (s for s in slots if s.needs_prefill):
            write(scheduler, contents, slot, 0, slot.length)
        for slot in slots:
            assert slot.length == len(slot.sequence.all_tokens) - 1
            copy_page(contents, slot)
        check(scheduler, contents)
        assert any(scheduler.iter_slots())
        for slot in list(scheduler.iter_slots()):
            sequence = slot.sequence
            n = min(segment, draws[sequence.key] - len(sequence.tokens))
            assert slot.length + n <= len(slot.pages) * page
            write(scheduler, contents, slot, slot.length, slot.length + n)
            sequence.tokens += [0] * n
            slot.length += n
        check(scheduler, contents)
        for slot in list(scheduler.iter_slots()):
            if len(slot.sequence.tokens) == draws[slot.sequence.key]:
                slot.sequence.finish_reason = "stop"
                ended.append(slot.sequence)
                scheduler.release_slot(slot)
    else:
        raise AssertionError("the run does not end")
    assert first_inserted == list(range(len(sequences)))
    assert len(ended) == len({id(s) for s in ended})
    assert sorted(s.key for s in ended) == sorted(s.key for s in sequences)
    assert all(sorted(free) == list(range(pages)) for free in scheduler.free_pages)
    assert not any(any(refs) for refs in scheduler.page_refs)


def test_samples_share_the_pages_of_their_prompt():
    """Four samples of 10 tokens in pages of 4 share two full pages and have copies of the third."""
    sequences = [Sequence([5] * 11, (0, i), 3) for i in range(4)]
    scheduler = Scheduler(sequences, shards=1, rows=4, pages=12, page_size=4, segment=2)
    slots = scheduler.insert_waiting()
    assert [slot.needs_prefill for slot in slots] == [True, False, False, False]
    assert len({tuple(slot.pages[:2]) for slot in slots}) == 1
    assert len({slot.pages[2] for slot in slots}) == 4
    assert [slot.page_copy and slot.page_copy[0] for slot in slots] == [None] + [
        slots[0].pages[2]
    ] * 3
    assert len(scheduler.free_pages[0]) == 12 - 2 - 4


def test_youngest_slot_is_parked_when_the_pool_is_full():
    """Two slots of one page in a pool of three: when both need a second page, the younger waits."""
    sequences = [Sequence([i, 1, 2, 3], (0, i), 6) for i in range(2)]
    scheduler = Scheduler(sequences, shards=1, rows=2, pages=3, page_size=4, segment=1)
    first, second = scheduler.insert_waiting()
    for slot in (first, second):
        slot.length += 1
        slot.sequence.tokens.append(7)
    assert scheduler.grow_slots() == [second] and list(scheduler.iter_slots()) == [first]
    assert [s for _, s in scheduler.queue] == [sequences[1]]
    assert len(first.pages) == 2 and not second.pages
    sequences[1].finish_reason = "stop"  # as when a stop string is found late
    scheduler.release_slot(first)
    assert not scheduler.insert_waiting() and not scheduler.queue


def test_compact_rows_moves_the_last_slots_to_the_first_rows():
    sequences = [Sequence([i, 1], (0, i), 6) for i in range(8)]
    scheduler = Scheduler(sequences, shards=2, rows=4, pages=4, page_size=8, segment=1, pinned=True)
    slots = scheduler.insert_waiting()
    for slot in slots:
        if slot.row != 2:
            scheduler.release_slot(slot)
    assert scheduler.compact_rows(1) == [[2], [2]]
    assert [(s.row, s.pages, s.shard) for s in scheduler.iter_slots()] == [(0, [0], 0), (0, [0], 1)]
    for slot in list(scheduler.iter_slots()):
        scheduler.release_slot(slot)
    assert scheduler.free_pages == [[0], [0]] and scheduler.page_refs == [[0], [0]]
