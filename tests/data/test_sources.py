"""Rows of files, hub sets and TFDS; known columns; mixtures; shares; prefetching; bad rows."""

import functools
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from assets import make_rows
from configs import base
from distill.data import chat, collate, dataset, sources
from distill.data.examples import Example
from models.errors import UserError
from tests.support.paths import ROOT

ROWS = [{"question": f"{i} + 1?", "solution": f"é {i + 1}", "answer": str(i + 1)} for i in range(9)]


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "teacher")
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def qwen3(shared_data: Path) -> PreTrainedTokenizerBase:
    tokenizer = chat.load_tokenizer(shared_data / "qwen3_tokenizer")
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def config(source: Path | str, **fields: Any) -> ConfigDict:
    c = base.make_stage("sft").data
    c.source = str(source)
    c.update(fields)
    return c


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def everything(rows: sources.Rows) -> list[dict]:
    return [rows.read_row(i) for i in range(rows.size)]


# Every kind of source gives the same rows


def as_jsonl(folder: Path) -> str:
    return str(lines(folder / "rows.jsonl", ROWS))


def as_json_list(folder: Path) -> str:
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    return str(folder / "rows.json")


def as_json_lines(folder: Path) -> str:
    return str(lines(folder / "rows.json", ROWS))


def as_parquet(folder: Path) -> str:
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(folder / "rows.parquet"))
    return str(folder / "rows.parquet")


def as_hub_folder(folder: Path) -> str:
    lines(folder / "set" / "train.jsonl", ROWS)
    lines(folder / "set" / "test.jsonl", ROWS[:2])
    return f"hf:{folder / 'set'}"


def as_hub_parquet(folder: Path) -> str:
    (folder / "set").mkdir()
    as_parquet(folder / "set")
    return f"hf:{folder / 'set'}::train[:9]"


@pytest.mark.parametrize(
    "write", [as_jsonl, as_json_list, as_json_lines, as_parquet, as_hub_folder, as_hub_parquet]
)
def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path, write: Any) -> None:
    source = write(tmp_path)
    rows = sources.open_rows(source)
    assert rows.size == len(ROWS) and everything(rows) == ROWS
    assert [rows.read_row(i) for i in (7, 0, 3)] == [ROWS[7], ROWS[0], ROWS[3]]
    name = rows.locate_row(4).removeprefix(source)
    assert rows.locate_row(4).startswith(source) and name in (":5", "[4]", " row 4", ": row 4")
    assert sources.open_rows(source, size=4).size == 4
    assert [row for _, row in dataset.open_canonical_rows(source, 3)] == ROWS[:3]


def test_a_split_can_be_named_and_sliced(tmp_path: Path) -> None:
    source = as_hub_folder(tmp_path)
    assert everything(sources.open_rows(f"{source}::test")) == ROWS[:2]
    assert everything(sources.open_rows(f"{source}:default:train[2:5]")) == ROWS[2:5]


def test_a_stream_gives_the_same_rows_in_any_order(tmp_path: Path) -> None:
    source = as_hub_folder(tmp_path)
    rows = sources.open_rows(source, size=9, window=4)
    assert rows.window == 4 and everything(rows) == ROWS
    assert [rows.read_row(i) for i in (8, 0, 1, 5)] == [ROWS[8], ROWS[0], ROWS[1], ROWS[5]]
    with pytest.raises(UserError, match=r"needs config\.data\.max_rows"):
        sources.open_rows(source, window=4)
    short = sources.open_rows(source, size=20, window=4)
    with pytest.raises(UserError, match=r"has only 9 rows, config\.data\.max_rows says 20"):
        short.read_row(10)
    with pytest.raises(UserError, match="not read through hf:"):
        sources.open_rows(as_jsonl(tmp_path), window=4)


def test_a_streamed_step_is_a_function_of_the_step(
    tmp_path: Path, tiny: PreTrainedTokenizerBase
) -> None:
    c = config(as_hub_folder(tmp_path), streaming=True, shuffle_window=4, max_rows=9)
    source = dataset.load_source(c, tiny, 0, True)
    steps = [[e.where for e in dataset.get_step_examples(source, step, 3, 0)] for step in range(9)]
    for epoch in range(3):
        assert len({w for step in steps[3 * epoch : 3 * epoch + 3] for w in step}) == 9
    assert {w[-1] for step in steps[:1] for w in step} <= set("0123")  # of the first window
    assert steps[0:3] != steps[3:6]
    again = dataset.load_source(c, tiny, 0, True)
    assert [e.where for e in dataset.get_step_examples(again, 7, 3, 0)] == steps[7]


TFDS = """
import importlib.util, sys

class Without:  # hides TensorFlow from import and find_spec
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError(name)

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tensorflow" else find(name, *rest)
sys.meta_path.insert(0, Without())
import numpy as np, tensorflow_datasets as tfds
from distill.data import canonical, messages, sources

def build(folder):
    text = tfds.features.Text()
    turns = tfds.features.Sequence({"from": text, "value": text})

    class Chats(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"conversations": turns, "n": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, downloads):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                said = [("human", f"q{i}"), ("gpt", f"é{i}".encode() if i else b"caf\\xe9")]
                yield i, {"conversations": [{"from": f, "value": v} for f, v in said], "n": i}

    builder = Chats(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)

path = build(sys.argv[1])
rows = sources.open_rows(f"tfds:{path}")
assert rows.size == 5
seen = []
for i in range(5):
    try:
        row = canonical.canonicalize_row(rows.read_row(i), "", rows.locate_row(i), True)
        messages.parse_messages(row, rows.locate_row(i), prompt=False)
    except Exception as error:
        assert f"tfds:{path} row {i}: " in str(error) and "not a text" in str(error), error
        continue
    assert row["messages"] == [
        {"role": "user", "content": f"q{row['n']}"},
        {"role": "assistant", "content": f"é{row['n']}"},
    ], row
    seen.append(row["n"])
assert "tensorflow" not in sys.modules and sorted(seen) == [1, 2, 3, 4] and type(seen[0]) is int
assert sources.open_rows(f"tfds:{path}::train[:2]").size == 2
print("read")
"""


def test_tfds_without_tensorflow(tmp_path: Path) -> None:
    """Writes and reads array_record files in a process that cannot import TensorFlow."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TFDS, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "read", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such.parquet", "no/such.parquet: no such file"),
        ("no/such.json", "no/such.json: no such file"),
        ("hf:no/such", "hf:no/such: cannot be read: "),
        ("tfds:no_such", "tfds:no_such: cannot be read: "),
    ],
)
def test_a_missing_source_is_one_line(source: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        sources.open_rows(source)
    assert words in str(error.value) and "\n" not in str(error.value)


# Columns: test_canonical.py has all forms


def test_the_template_wraps_questions_only(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "p", "answer": None}])
    source = dataset.load_source(config(path, template="Q {question} {x}"), tiny, 0, False)
    texts = [str(tiny.decode(source.read_example(i).prompt)) for i in range(source.size)]
    assert texts[3] == "<|im_start|>user\nQ 3 + 1? {x}<|im_end|>\n<|im_start|>assistant\n"
    assert texts[9] == "p" and source.read_example(9).answer == ""
    with pytest.raises(UserError, match=r"config\.data\.template='Q': has no \{question\}"):
        dataset.load_source(config(path, template="Q"), tiny, 0, False)


def test_columns_are_adapted_by_name_or_by_pairs(
    tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    orca = lines(tmp_path / "orca.jsonl", [{"question": "2+2?", "answer": "It is 4."}])
    with pytest.raises(UserError, match=r"orca\.jsonl:1: neither response nor solution among"):
        dataset.load_source(config(orca), tiny, 0, True)
    example = dataset.load_source(config(orca, columns="orca_math"), tiny, 0, True).read_example(0)
    assert tiny.decode(example.response) == "It is 4.<|im_end|>"
    other = lines(tmp_path / "other.jsonl", [{"input": "2+2?", "output": "4"}])
    example = dataset.load_source(
        config(other, columns="question=input, response=output"), tiny, 0, True
    )
    assert tiny.decode(example.read_example(0).response) == "4<|im_end|>"


KEPT = sorted(path.stem for path in (ROOT / "assets" / "rows").glob("*.jsonl"))


def test_kept_rows_are_what_the_script_makes() -> None:
    made = make_rows.make_rows()
    assert sorted(made) == [f"{name}.jsonl" for name in KEPT]
    for name, rows in made.items():
        assert everything(sources.open_rows(str(ROOT / "assets" / "rows" / name))) == rows


@pytest.mark.parametrize("name", KEPT)
def test_kept_rows_of_each_set_are_traces_and_prompts(
    tiny: PreTrainedTokenizerBase, name: str
) -> None:
    path = ROOT / "assets" / "rows" / f"{name}.jsonl"
    columns = {"orca_math": "response=answer"}.get(name, "")
    examples: dict[bool, list[Example]] = {}
    for with_responses in (True, False):
        c = config(path, columns=columns)
        lacks_responses = name in ("dapo_math", "choice", "ifeval", "questions")
        if lacks_responses if with_responses else name == "documents":
            with pytest.raises(UserError, match=rf"{name}\.jsonl:1: "):
                dataset.load_source(c, tiny, 0, with_responses)
            return
        source = dataset.load_source(c, tiny, 0, with_responses)
        examples[with_responses] = [source.read_example(i) for i in range(source.size)]
    for trace, prompt in zip(examples[True], examples[False], strict=True):
        assert trace.answer == prompt.answer
        question = str(tiny.decode(prompt.prompt))
        assert question.startswith("<|im_start|>user\n") and str(tiny.decode(trace.prompt)) in (
            question,
            question + chat.EMPTY_THINK,
        )
        assert question.endswith("<|im_start|>assistant\n")
        response = str(tiny.decode(trace.response))
        assert response.endswith("<|im_end|>") and response.count("<think>") in (0, 1)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "[4]", '{"a": 4}', "true", "null", '" "'])
def test_what_is_no_answer_is_none(
    tiny: PreTrainedTokenizerBase, tmp_path: Path, value: str
) -> None:
    """Training then refuses the row where a grader reads it, and no other."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "2+2?", "response": "4", "answer": {value}}}\n')
    for with_responses in (True, False):
        source = dataset.load_source(config(path), tiny, 0, with_responses)
        assert source.read_example(0).answer == ""


def test_a_document_is_trained_from_its_second_token(
    tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": "The manual."}])
    example = dataset.load_source(config(path), tiny, 0, True).read_example(0)
    assert tiny.decode(example.prompt + example.response) == "The manual.<|im_end|>"
    assert len(example.prompt) == 1


# Chats


def test_the_last_or_all_turns_are_trained(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def thought(text: str) -> dict:
        return {"role": "assistant", "reasoning_content": "hm", "content": text}

    asked = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, thought("one")]
    path = lines(
        tmp_path / "rows.jsonl",
        [{"messages": [*asked, {"role": "user", "content": "b"}, thought("two")]}],
    )

    def trained(turns: str) -> tuple[str, str]:
        example = dataset.load_source(config(path, turns=turns), tiny, 0, True).read_example(0)
        batch = collate.collate_rows([[example]], collate.BatchLayout(200, 200))
        ids, mask = np.asarray(batch.tokens_BT)[0], np.asarray(batch.mask_BT)[0]
        return str(tiny.decode(ids[mask])), str(tiny.decode(example.prompt))

    last, prompt = trained("last")
    assert last == "<think>\nhm\n</think>\n\ntwo<|im_end|>"
    assert prompt.endswith("one<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n")
    assert "hm" not in prompt  # the template drops earlier reasoning
    assert trained("all")[0] == "one<|im_end|><think>\nhm\n</think>\n\ntwo<|im_end|>"


@pytest.mark.parametrize("name", ["chat/conversations", "traces/deepseek_r1_math"])
def test_real_rows_decode_to_their_own_text(
    shared_data: Path, qwen3: PreTrainedTokenizerBase, name: str
) -> None:
    path = shared_data / f"{name}.jsonl"
    source = dataset.load_source(config(path), qwen3, 0, True)
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    assert source.size == len(rows)
    for i, row in enumerate(rows):
        if "messages" in row:
            response = row["messages"][-1]["content"]
        else:
            response = f"<think>\n{row['thinking'].strip()}\n</think>\n\n{row['content'].strip()}"
        batch = collate.collate_rows([[source.read_example(i)]], collate.BatchLayout(8000, 7000))
        ids, mask = np.asarray(batch.tokens_BT)[0], np.asarray(batch.mask_BT)[0]
        assert qwen3.decode(ids[mask]) == response + "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "count"), [("math_train/level3to5", 8880), ("deepmath/prompts_sample", 2000)]
)
def test_real_prompts_are_rendered_with_their_answers(
    shared_data: Path, qwen3: PreTrainedTokenizerBase, name: str, count: int
) -> None:
    source = dataset.load_source(
        config(shared_data / f"{name}.jsonl"), qwen3, 0, with_responses=False
    )
    assert source.size == count
    for i in range(0, count, 97):
        text = str(qwen3.decode(source.read_example(i).prompt))
        assert text.startswith("<|im_start|>user\n") and source.read_example(i).answer
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


# Shares and mixtures


def numbered(size: int, offset: int = 0) -> dataset.Source:
    return dataset.Source(size, lambda i: Example([offset + i], [], "", ""))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_disjoint_shares_of_a_step(processes: int) -> None:
    source, part = numbered(40), 8 // processes
    for step in range(10):
        whole = [e.prompt[0] for e in dataset.get_step_examples(source, step, 8, 5)]
        shares = [
            [
                e.prompt[0]
                for e in dataset.get_step_examples(
                    source, step, 8, 5, range(p * part, (p + 1) * part)
                )
            ]
            for p in range(processes)
        ]
        assert sum(shares, []) == whole  # noqa: RUF017
        assert len(set(whole)) == 8  # disjoint
    epoch = [
        e.prompt[0] for step in range(5) for e in dataset.get_step_examples(source, step, 8, 5)
    ]
    assert sorted(epoch) == list(range(40))  # and together all of it


def test_a_mixture_keeps_its_shares_and_each_set_its_epochs() -> None:
    mixed = dataset.mix_sources(
        [numbered(30), numbered(0, 1000), numbered(5, 500)], [1, 6, 0.0001], 0
    )
    drawn = [dataset.get_example(mixed, i, 0).prompt[0] for i in range(2000)]
    first, rest = drawn[:1000], drawn[1000:]
    for block in (first, rest):
        assert sum(n < 500 for n in block) == 142 and sum(500 <= n < 1000 for n in block) == 1
    endless = [n for n in drawn if n >= 1000]
    assert endless == list(range(1000, 1000 + len(endless)))
    small = [n for n in drawn if n < 500]
    assert all(sorted(small[i : i + 30]) == list(range(30)) for i in range(0, 270, 30))
    again = dataset.mix_sources(
        [numbered(30), numbered(0, 1000), numbered(5, 500)], [1, 6, 0.0001], 0
    )
    assert [dataset.get_example(again, i, 0).prompt[0] for i in (1999, 3, 1000)] == [
        drawn[i] for i in (1999, 3, 1000)
    ]


def test_a_mixture_from_the_config_has_its_shares(
    tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    c = config("", mixture=((as_jsonl(tmp_path), 1.0), ("arithmetic", 3.0)))
    source = dataset.load_source(c, tiny, 0, True)
    names = [e.where for step in range(10) for e in dataset.get_step_examples(source, step, 100, 0)]
    assert sum(".jsonl:" in name for name in names) == 250
    for bad in (("arithmetic", 0.0), ("arithmetic", "1"), "arithmetic", 3.0):
        with pytest.raises(UserError) as error:
            dataset.load_source(config("", mixture=(bad,)), tiny, 0, True)
        assert str(error.value).startswith(f"config.data.mixture: {bad!r} is no pair")


def test_prefetching_gives_the_same_results() -> None:
    asked: list[int] = []

    def make(step: int) -> int:
        asked.append(step)
        if step == 7:
            raise UserError("row 7")
        return step * step

    get = dataset.prefetch_next(make, 8)
    assert [get(step) for step in (3, 4, 5, 2, 3)] == [9, 16, 25, 4, 9]
    assert get(6) == 36
    for _ in range(2):
        with pytest.raises(UserError, match="row 7"):
            get(7)
    assert 8 not in asked


def test_prefetching_serves_any_order_from_one_thread() -> None:
    """Sampling steps read prompts twice, and further ones that belong to no step."""
    asked: list[int] = []
    threads: set[int] = set()
    made = [threading.Event() for _ in range(20)]

    def make(step: int) -> object:
        asked.append(step)
        threads.add(threading.get_ident())
        made[step].set()
        return object()

    get = dataset.prefetch_next(functools.lru_cache(maxsize=4)(make), 8)
    first = get(0)
    assert made[1].wait(10)  # while the first is used
    assert get(12) is not first and get(0) is first
    second = get(1)
    assert made[2].wait(10) and get(1) is second and get(15) is not None
    assert get(5) is not None and made[6].wait(10)
    assert get(3) is not None and made[4].wait(10)
    assert asked == [0, 1, 12, 2, 15, 5, 6, 3, 4]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_prefetching_holds_one_result() -> None:
    class Made: ...

    held: weakref.WeakSet[Made] = weakref.WeakSet()

    def make(step: int) -> Made:
        held.add(found := Made())
        return found

    get = dataset.prefetch_next(make, 100)
    for step in (0, 1, 50, 51, 7, 99, 3, 120, 4):
        get(step)
    get(200)  # waits for what is begun
    assert len(held) <= 2


# Bad rows

IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}
BAD = {
    "a column is missing": (b'{"questions": "q"}', "none of tokens, prompt, messages, question"),
    "ends with the user": (
        json.dumps({"messages": [ASSISTANT, USER]}).encode(),
        "must be assistant",
    ),
    "an image": (json.dumps({"messages": [IMAGE, ASSISTANT]}).encode(), "part of type 'image_url'"),
    "a byte": (b'{"question": "caf\xe9", "response": "r"}', "not UTF-8 ("),
    "half a pair": (b'{"question": "\\ud83d", "response": "r"}', "half a surrogate pair"),
    "an empty response": (b'{"question": "q", "response": " \\n"}', "the response is empty"),
    "a megabyte": (b'{"question": "' + b"word " * 200_000 + b'", "response": "r"}', "prompt of"),
    "known set, odd value": (
        b'{"question": "q", "final_answer": "4", "r1_solution_1": null}',
        "r1_solution_1 is not a text",
    ),
    "a weight": (
        b'{"question": "q", "response": "r", "weight": 0}',
        "weight=0: rows have no weights",
    ),
    "speaker": (
        b'{"conversations": [{"from": "bot", "value": "x"}]}',
        "conversations[0].from 'bot'",
    ),
    "nothing verified": (
        b'{"problem": "q", "generations": ["x"], "correctness_math_verify": [false]}',
        "generations: none is complete and verified correct",
    ),
}


def bad_file(path: Path, line: bytes) -> Path:
    good = [json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\n".join([*good[:4], line, *good[4:]]) + b"\n")
    return path


def short(example: Example) -> None:
    dataset.require_valid_example(example, 1000, "max_prompt_tokens", 10**6)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_fatal_or_skipped(
    tmp_path: Path, tiny: PreTrainedTokenizerBase, name: str, capsys: Any
) -> None:
    line, words = BAD[name]
    path = bad_file(tmp_path / "rows.jsonl", line)
    with pytest.raises(UserError) as error:
        dataset.load_source(config(path), tiny, 0, True, short)
    assert str(error.value).startswith(f"{path}:5") and words in str(error.value)
    source = dataset.load_source(config(path, on_bad_row="skip"), tiny, 0, True, short)
    assert source.size == len(ROWS)  # no other row is lost
    assert list(source.skip_reasons) == [f"{path}:5"] and words in source.skip_reasons[f"{path}:5"]
    said = capsys.readouterr().err
    assert f"{path}:5" in said and f"{path}: 1 of the first 10 rows are skipped" in said
    if name == "a megabyte":
        return  # tokenised often enough
    # Past the rows that are checked before step 0, it shows when it is read.
    for policy in ("fail", "skip"):
        late = dataset.load_source(
            config(path, on_bad_row=policy, check_rows=3), tiny, 0, True, short
        )
        assert late.size == 10 and not late.skip_reasons
        if policy == "fail":
            with pytest.raises(UserError, match="5"):
                dataset.get_step_examples(late, 0, 10, 0)
        else:
            read = [e.where for e in dataset.get_step_examples(late, 0, 10, 0)]
            assert read.count(f"{path}:6") == 2 and len(read) == 10 and len(late.skip_reasons) == 1
            dataset.get_step_examples(late, 1, 10, 0)
            assert len(late.skip_reasons) == 1


def test_of_many_bad_rows_the_first_are_named_and_all_are_counted(
    tmp_path: Path, tiny: PreTrainedTokenizerBase, capsys: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(ROWS[0]), *["{"] * 30, json.dumps(ROWS[1])]
    path.write_text("\n".join(lines) + "\n")
    source = dataset.load_source(config(path, on_bad_row="skip"), tiny, 0, True)
    assert source.size == 2 and len(source.skip_reasons) == 30
    *named, more, count = capsys.readouterr().err.splitlines()
    assert [line.partition(": not")[0] for line in named] == [
        f"skipped: {path}:{number}" for number in range(2, 7)
    ]
    assert more == "skipped: more rows, which from here on are only counted"
    assert count == f"{path}: 30 of the first 32 rows are skipped"


def test_a_source_without_a_good_row_is_an_error(
    tmp_path: Path, tiny: PreTrainedTokenizerBase
) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"question": "q"}] * 3)
    for check in (0, 2, 3):
        with pytest.raises(UserError, match=r"no good row; .*rows\.jsonl:\d: neither response nor"):
            dataset.get_step_examples(
                dataset.load_source(
                    config(path, on_bad_row="skip", check_rows=check), tiny, 0, True
                ),
                0,
                2,
                0,
            )
    with pytest.raises(
        UserError, match=r"config\.data\.on_bad_row='warn': must be one of 'fail', 'skip'"
    ):
        dataset.load_source(config(path, on_bad_row="warn"), tiny, 0, True)
