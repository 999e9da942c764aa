"""Every parser that meets outside data, with the inputs that it is given in fuzzing."""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from hypothesis import strategies as st
from safetensors.numpy import save

from distill.data import canonical, chat, columns, examples, sources, template, turns
from distill.data import messages as chats
from distill.evaluation import comparison, problems, records, rejection, statistics, tasks
from distill.policy import hub, identity
from distill.rewards import graders, sandbox
from distill.rollout import served_model
from distill.rollout.sampling import Sampling
from distill.runtime import addresses, http_client, run_files
from distill.teachers import stored, stored_files, wire
from distill.teachers.outputs import ResponseOutput
from models import adapter, families, tensor_files, weights
from models.errors import UserError
from tests.support import fuzzing, templates, verbs
from tests.support.fuzzing import Strategy, as_files, as_lines, make_values, mutate, scalars, texts
from tests.support.paths import ROOT
from tests.support.task_rows import task_rows

STUDENT = ROOT / "assets" / "student"


@dataclasses.dataclass(frozen=True)
class Parser:
    """inputs: what is drawn. read: (input, an empty directory) -> what it parses.

    cost: how many inputs of a cheap parser one of this takes the time of.
    has_workers: it gives the risky part to processes that can be killed.
    """

    inputs: Strategy
    read: Callable[[Any, Path], Any]
    cost: int = 1
    has_workers: bool = False


@functools.cache
def load_tokenizer(chat_template: str = "") -> Any:
    tokenizer = chat.load_tokenizer(STUDENT)
    assert tokenizer is not None
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    return tokenizer


def write(directory: Path, name: str, content: bytes) -> Path:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
    return directory / name


@functools.cache
def list_fields(name: str) -> Any:
    return json.loads((STUDENT / name).read_text())


# Rows, and the chats in them.

_COLUMNS = (
    *(*columns.CANONICAL, *columns.PROMPTS, *columns.SYSTEMS, *columns.TOOLS, columns.HISTORY),
    *(*columns.RESPONSES, *columns.REASONING, *columns.ANSWERS, *columns.WEIGHTS, *columns.LABELS),
    *(*columns.MEDIA, *columns.OPTIONS, *columns.VERIFIED, *columns.UNREAD_FORMS, *columns.TRACES),
    *(x for pair in columns.THOUGHTS for x in pair),
    *("r1_solution_1", "content", "text", "input", "context", "top_logprobs", "loss_mask", "id"),
    *("enable_thinking", "chat_template_kwargs", "samples", "instruction_id_list", "kwargs"),
)
_KEYS = ("role", "content", "from", "value", "type", "text", "name", "arguments", "function")
_KEYS += (
    "tool_calls",
    "function_call",
    "tools",
    "weight",
    "train",
    "reasoning_content",
    "thinking",
)
_KEYS += ("parameters", "properties", "ground_truth", "finish_reason", "tokens", "correct")
keys = st.sampled_from(_KEYS) | texts
chat_values = make_values(keys)
calls = st.fixed_dictionaries(
    {}, optional={"type": scalars, "function": chat_values, "name": texts, "arguments": chat_values}
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from([*turns.ROLES]) | scalars, "content": texts | chat_values},
    optional={
        "tool_calls": st.lists(calls, max_size=2) | chat_values,
        "function_call": calls | chat_values,
        **dict.fromkeys(("reasoning_content", "thinking", "value", "weight"), chat_values),
    },
)
conversations = st.lists(messages, max_size=4) | chat_values
tools = st.lists(calls | texts, max_size=2) | chat_values
cells = texts | chat_values | conversations | tools | st.lists(st.integers(0, 600), max_size=5)
rows = st.dictionaries(st.sampled_from(_COLUMNS) | texts, cells, max_size=6)
anything = rows | fuzzing.values


def read_rows(content: bytes, directory: Path, name: str = "rows.jsonl") -> None:
    opened = sources.open_rows(str(write(directory, name, content)))
    for index in range(opened.size):
        with contextlib.suppress(UserError):
            make_examples(opened.read_row(index), directory)


@functools.cache
def _get_parquet() -> bytes:
    stream = io.BytesIO()
    turns_ = [[{"role": "user", "content": "2+2?"}]] * 2
    table = {"question": ["2+2?", "3?"], "answer": ["4", None], "messages": turns_}
    pq.write_table(pa.table(table), stream)
    return stream.getvalue()


def make_examples(row: dict, directory: Path) -> None:
    """Reads a row as a prompt and as a trace, with tokenizers of each kind and without one."""
    for kind in (None, "", templates.THINKING_ONLY, templates.INSTRUCT):
        tokenizer = None if kind is None else load_tokenizer(kind)
        for with_responses in (False, True):
            for share, learned in ((1.0, "last"), (0.5, "all")):
                encoding = examples.Encoding(tokenizer, with_responses, share, learned)
                with contextlib.suppress(UserError):
                    read = canonical.canonicalize_row(row, "", "f:1", with_responses)
                    canonical.apply_template(read, "{question}!")
                    canonical.refuse_weights(read, "f:1")
                    examples.make_example(read, "f:1", encoding)


def read_messages(row: dict, directory: Path) -> None:
    tokenizer = load_tokenizer()
    with contextlib.suppress(UserError):
        turns.read_turns(row["messages"], "messages")
    with contextlib.suppress(UserError):
        turns.read_tools(row["tools"], "tools")
    with contextlib.suppress(UserError):
        turns.read_history(row["messages"])
    parsed = chats.parse_messages(row, "f:1", prompt=None)
    found = chats.parse_tools(row, "f:1")
    template.require_tools_rendered(tokenizer, parsed, found)
    chat.render_messages(tokenizer, parsed, tools=found)
    if parsed[-1]["role"] == "assistant":
        chat.encode_conversation(tokenizer, parsed, found)


# Templates: pieces of the language, some of which never end.

_PIECES = (
    *("{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{% if tools %}"),
    *(
        "{% endif %}",
        "{% for i in range(99999) %}",
        "{% for i in range(10**9) %}",
        "{{ 'a' * 9**9 }}",
    ),
    *("{{ 9**9**9**9 }}", "{{ [0] * 10**10 }}", "{% set ns = namespace(x='ab') %}", "{{ ns.x }}"),
    *(
        "{% set ns.x = ns.x + ns.x %}",
        "{% set ns.x = ns.x ~ ns.x %}",
        "{% endmacro %}",
        "{% else %}",
    ),
    *("{% macro f(n) %}", "{{ f(n) }}{{ f(n) }}", "{{ f(1) }}", "{{ 'a' | center(10**10) }}"),
    *("{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ raise_exception('no') }}"),
    *("{{ '%99999999999d' % 1 }}", "{{ '{:99999999999}'.format(1) }}", "{{ 'a'.ljust(10**10) }}"),
    *("{{ messages | tojson }}", "{% generation %}", "{% endgeneration %}", "{% break %}", "{{"),
    *(
        "<think>",
        "</think>",
        "<|im_start|>assistant\n",
        "{% if enable_thinking %}",
        "{#",
        "%}",
        "}}",
    ),
    *(
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{{ self }}",
        "{{ config }}",
    ),
    *("{% call f(1) %}", "{% endcall %}", "{{ cycler('a') }}", "{{ lipsum(n=10**7) }}", "(" * 300),
)
_NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
pieces = st.sampled_from((*_PIECES, _NESTED)) | texts
template_texts = st.lists(pieces, max_size=8).map("".join) | fuzzing.mutate_bytes(
    templates.THINKING_ONLY.encode()
).map(lambda content: content.decode(errors="replace"))


@functools.cache
def load_own_tokenizer() -> Any:
    return chat.load_tokenizer(STUDENT)


def render_template(text: str, directory: Path) -> None:
    tokenizer = load_own_tokenizer()
    tokenizer.chat_template = text
    template.describe_template(tokenizer)
    prompt = [{"role": "user", "content": "2+2?"}]
    chat.render_messages(tokenizer, prompt, thinking=True)
    chat.encode_conversation(tokenizer, [*prompt, {"role": "assistant", "content": "4"}], None)


# The files of a model.

_DENSE = {k: v for k, v in list_fields("config.json").items() if v is not None}
_SPARSE = _DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}
_CONFIG_KEYS = st.sampled_from(
    [
        *(*_SPARSE, "quantization_config", "layer_types", "rope_parameters", "num_local_experts"),
        *("student", "stages", "lora", "ema_decay", "path", "tokenizer"),
    ]
)
config_files = as_files(
    mutate(_DENSE, _CONFIG_KEYS) | mutate(_SPARSE, _CONFIG_KEYS) | fuzzing.values
)


def read_config(content: bytes, directory: Path) -> None:
    write(directory, "config.json", content)
    hub.is_run(directory)
    hub.has_moving_average(directory)
    with contextlib.suppress(UserError):
        hub.read_run_lora(directory)
    with contextlib.suppress(UserError):
        hub.resolve_tokenizer_dir(directory)
    with contextlib.suppress(UserError):
        chat.load_stop_ids(directory)
    config = families.read_config(directory)
    assert config.num_parameters > 0 and config.context_length > 0
    assert len(config.sparse_layers) == config.num_hidden_layers
    written = families.parse_config(config.to_hf(), "f")
    assert written == config or not config.num_experts  # then the fields of experts are left out


def read_generation_config(content: bytes, directory: Path) -> None:
    write(directory, "generation_config.json", content)
    (directory / "out").mkdir()
    stops = chat.load_stop_ids(directory)
    chat.copy_tokenizer(directory, STUDENT, stops, directory / "out")


def _cut_tokenizer() -> dict:
    """Returns a tokenizer whose parts are few, so that changes reach all of them."""
    fields = dict(list_fields("tokenizer.json"))
    fields["added_tokens"] = fields["added_tokens"][:3]
    model = dict(fields["model"])
    merges = model["merges"][:3]
    singles = [token for token in model["vocab"] if len(token) == 1][:60]
    joined = ["".join(m) if isinstance(m, list) else m.replace(" ", "") for m in merges]
    model["vocab"] = {token: i for i, token in enumerate(dict.fromkeys([*singles, *joined]))}
    return fields | {"model": model | {"merges": merges}}


_TOKENIZER, _TOKENIZER_CONFIG = _cut_tokenizer(), list_fields("tokenizer_config.json")
_CLASSES = st.sampled_from(["Qwen2Tokenizer", "LlamaTokenizer", "BertTokenizer", "X", "../x"])
tokenizer_files = st.tuples(
    as_files(mutate(_TOKENIZER)) | fuzzing.mutate_bytes(json.dumps(_TOKENIZER).encode()),
    as_files(
        mutate(_TOKENIZER_CONFIG, st.sampled_from(["auto_map", "tokenizer_class", "backend"]))
        | _CLASSES.map(lambda name: _TOKENIZER_CONFIG | {"tokenizer_class": name})
    ),
    st.none() | template_texts.map(fuzzing.to_bytes),
)


def read_tokenizer(contents: tuple[bytes, bytes, bytes | None], directory: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name, content in zip(names, contents, strict=True):
        if content is not None:
            write(directory, name, content)
    tokenizer = chat.load_tokenizer(directory)
    assert tokenizer is not None
    template.describe_template(tokenizer)
    chat.require_same_tokenizer(tokenizer, load_tokenizer(), ("a", "b"))
    chat.render_messages(tokenizer, [{"role": "user", "content": "2+2?"}])


# The headers of safetensors: offsets, shapes and dtypes that contradict the file or one another.
_HEADER = {
    "__metadata__": {"format": "pt"},
    "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [16, 24]},
}
_DTYPES = st.sampled_from(["F32", "F64", "BF16", "I8", "F8_E4M3", "F4", "U64", "X", ""])
_OFFSETS = st.sampled_from([0, 1, 16, 24, 2**31, 2**62, 2**63, 2**64 - 1, -1])
_HEADER_VALUES = st.one_of(fuzzing.values, _DTYPES, _OFFSETS, st.lists(_OFFSETS, max_size=3))


def _pack(header: bytes, length: int | None, body: bytes) -> bytes:
    size = len(header) if length is None else length
    return (size % 2**64).to_bytes(8, "little") + header + body


tensor_contents = st.builds(
    _pack,
    as_files(mutate(_HEADER, leaves=_HEADER_VALUES)),
    st.none() | st.integers(0, 400) | _OFFSETS,
    st.just(bytes(24)) | st.binary(max_size=30),
) | fuzzing.mutate_bytes(_pack(json.dumps(_HEADER).encode(), None, bytes(24)))
_SHARDS = (
    st.sampled_from(["s1", "../s1", "/etc/passwd", "", ".", "s1/x", "a" * 300, "x\0y"]) | texts
)
index_files = as_files(
    mutate({"weight_map": {"a": "s1", "model.norm.weight": "s1"}}, leaves=fuzzing.values | _SHARDS)
)


@functools.cache
def _get_shapes() -> Any:
    config = families.read_config(STUDENT)
    return config, families.get_abstract_params(config)[0]


def read_tensors(contents: tuple[bytes, bytes], directory: Path) -> None:
    model, (config, shapes) = directory / "model", _get_shapes()
    write(model, "s1", contents[0])
    write(model, tensor_files.INDEX_FILE, contents[1])
    whole = write(directory, tensor_files.WHOLE_FILE, contents[0])
    with whole.open("rb") as file, contextlib.suppress(OSError):  # describe_file explains it
        identity._hash_samples(file)
    for files in ({whole: []}, None):
        with contextlib.suppress(UserError):
            files = files or tensor_files.list_files(model)
            outside = [file for file in files if directory not in file.resolve().parents]
            assert not outside, f"{outside[0]} is read"
            with tensor_files.open_tensors(files) as slices:
                weights.check_tensors(directory, slices, config, shapes)


_ADAPTER = {
    "base_model_name_or_path": "base",
    "peft_type": "LORA",
    "bias": "none",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layers_pattern": None,
    "exclude_modules": None,
    "peft_version": "0.18.1",
}
_PATTERNS = st.sampled_from(
    ["(a*)*b", ".*", "(", "[", "(?P<x>", "q_proj", "((.*)*)*x", "(.*.*.*)*$"]
)
_PATTERNS |= st.sampled_from(["(([a-z_.0-9])+.)+[A-Z]([a-z])+$", "all-linear", "q_proj|k_proj"])
adapter_files = as_files(
    mutate(_ADAPTER, leaves=fuzzing.values | _PATTERNS | st.dictionaries(_PATTERNS, scalars))
)


@functools.cache
def _get_adapter_tensors() -> bytes:
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    shapes = {"lora_A": (2, 96), "lora_B": (96, 2)}
    return save(
        {
            f"base_model.model.{module}.{name}.weight": np.zeros(shape, np.float32)
            for module in modules
            for name, shape in shapes.items()
        }
    )


def read_adapter(content: bytes, directory: Path) -> None:
    write(directory, adapter.CONFIG_FILE, content)
    write(directory, adapter.TENSORS_FILE, _get_adapter_tensors())
    with contextlib.suppress(UserError):
        hub.find_base_model(directory)
    adapter.read_lora_config(directory, _get_shapes()[0])


# Answers and what verify, evaluate and compare read.

answer_texts = st.lists(
    texts | st.sampled_from(["\\boxed{", "}", "^", "The answer is "]), max_size=6
)
answer_pairs = st.tuples(answer_texts.map("".join), answer_texts.map("".join))


def grade(pair: tuple[str, str], directory: Path) -> None:
    """Grades what runs in the trainer's own process; processes that can be killed do the rest."""
    response, answer = pair
    assert graders.grade_arithmetic(response, answer) in graders.OUTCOMES
    assert graders.grade_without_algebra(response, answer) in (None, *graders.OUTCOMES)
    graders.ARITHMETIC.is_gradable(answer)
    graders.MATH.is_gradable(answer)
    statistics.normalise_answer(answer)
    statistics.is_repetitive(response)
    statistics.has_mixed_languages(response, answer)
    for rule in (graders.MATH, graders.ARITHMETIC):
        assert rule.extract is not None
        rule.extract(response)


@functools.cache
def _start_grader() -> graders.Grader:
    return graders.Grader(timeout=2.0)


def grade_in_process(pair: tuple[str, str], directory: Path) -> None:
    assert set(_start_grader().grade(graders.MATH, [pair[0]], [pair[1]])) <= {*graders.OUTCOMES}


samples = st.fixed_dictionaries(
    {"text": texts | fuzzing.values}, optional={"finish_reason": scalars, "tokens": fuzzing.values}
)
sampled_rows = st.fixed_dictionaries(
    {"samples": st.lists(samples | fuzzing.values, max_size=3) | fuzzing.values, "answer": scalars},
    optional={"question": texts, "finish_reason": scalars},
)


def verify(content: bytes, directory: Path) -> None:
    opened = sources.open_rows(str(write(directory, "samples.jsonl", content)))
    for keep in ("correct", "finished", "all"):
        options: dict[str, Any] = {"max_samples": 1, "counts": collections.Counter()}
        with contextlib.suppress(UserError):
            kept = rejection.verify_rows(
                opened, graders.ARITHMETIC, keep=keep, skip_bad_rows=True, **options
            )
            run_files.write_jsonl(directory / "out.jsonl", kept)


_SUMMARY = {"problems": 2, "responses": 2, "accuracy": 0.5, "interval": [0.1, 0.9], "pass@2": 0.5}
_SUMMARY |= {"maj@2": 0.5, "protocol": {"benchmark": "gsm8k", "protocol": "greedy"}}
_SUMMARY |= {"parameters": 5, "memory": {"host_gib": 1.0}, "truncation_rate": 0.1}
_EXAMPLE = {"id": "a", "sample": 0, "correct": True, "answer": "4", "key": "k"}
_EXAMPLE |= {"outcome": "correct"}
_EXAMPLE |= {"length": 3, "finish_reason": "stop", "response": "4", "found": "4", "strict": [True]}
evaluations = st.tuples(as_files(mutate(_SUMMARY)), as_lines(mutate(_EXAMPLE)))


def compare(contents: tuple[tuple[bytes, bytes], tuple[bytes, bytes]], directory: Path) -> None:
    for name, (summary, lines) in zip("ab", contents, strict=True):
        write(directory / name, "summary.json", summary)
        write(directory / name, records.EXAMPLES_FILE, lines)
    folders = [str(directory / name) for name in "ab"]
    result = comparison.compare_runs(folders)
    run_files.write_json(directory / "out.json", result)
    comparison.render_table(folders, list(result["runs"].values()))


def resume_evaluation(contents: tuple[bytes, bytes], directory: Path) -> None:
    write(directory, records.PROTOCOL_FILE, contents[0])
    write(directory, records.EXAMPLES_FILE, contents[1])
    row = {"id": "a", "question": "2+2?", "answer": "4"}
    folder = epath.Path(directory)
    done = records.resume_evaluation(folder, {"problems": 1}, [("f:1", row)], [["k"]])
    records.render_transcripts([("f:1", row)], folder / records.EXAMPLES_FILE)
    if done:
        records.summarise_evaluation(folder, tasks.BENCHMARKS["gsm8k"], (1, 2))


READ_TASKS = ("gsm8k", "math500", "arithmetic", "ifeval", "gpqa", "mmlu_redux", "choice")
with contextlib.suppress(UserError):  # the search for one starts processes
    sandbox.find_isolation()
    READ_TASKS += ("livecodebench", "humaneval", "mbpp")


def read_problems(content: bytes, directory: Path) -> None:
    path = str(write(directory, "rows.jsonl", content))
    for name in READ_TASKS:
        known: problems.Problems = []
        with contextlib.suppress(UserError):
            known = problems.load_problems(name, path, 0)
            problems.check_gradable(name, known)
            for _, row in known:
                problems.render_question(name, row)
        with contextlib.suppress(UserError):
            problems.load_responses(name, path, known)


# Flags, and the files of a run.

VERBS = ("train", "generate", "score", "evaluate", "compare", "verify", "clean", "plan", "export")
_FLAGS = (
    "config",
    "workdir",
    "model",
    "data",
    "out",
    "benchmark",
    "samples",
    "temperature",
    "runs",
)
_FLAGS += ("prompts", "top_p", "thinking", "limit", "keep", "on_bad_row", "seed", "dtype", "help")
_FLAGS += ("v", "served_model", "api_key_env", "tokenizer")
_FLAGS += ("config.opd.loss.beta", "config.opd.steps", "config.stages", "config.student.path")
_FLAGS += ("config.opd.data.mixture", "config.opd.teachers", "config.mesh.data", "config.nothing")
flag_values = st.sampled_from(["configs/quickstart.py:tiny", "configs/base.py", "(1, 2)", "[", "x"])
flags = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["--", "-", "", "--no"]),
        st.sampled_from(_FLAGS) | texts,
        st.sampled_from(["=", "", "=", " "]),
        flag_values | texts | scalars.map(str),
    ),
)
command_lines = st.tuples(
    st.sampled_from(VERBS),
    st.booleans(),
    st.lists(flags.filter(lambda flag: "=/" not in flag and "\0" not in flag), max_size=4),
)


def parse_flags(command: tuple[str, bool, list[str]], directory: Path) -> None:
    verb, is_complete, arguments = command
    if is_complete and verb in ("train", "plan"):
        arguments = ["--config=configs/quickstart.py:tiny", "--workdir=x", *arguments]
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        assert verbs.call(_NoWork(verb), *arguments) in (0, 2)  # pyright: ignore[reportArgumentType]


class _NoWork:
    """A verb that only reads its flags."""

    def __init__(self, verb: str) -> None:
        self.__name__ = verb
        self.OPTIONS = verbs.verb_module(verb).OPTIONS
        self.main = lambda: None


_LOCK = {"host": "h", "pid": 1, "started": 1.0, "birth": "", "renewed": 2.0}
_INPUTS = {"inputs": {"config.sft": {"name": "x", "parts": {"": {"bytes": 1}}}}, "changes": []}
run_contents = st.tuples(
    as_lines(mutate({"step": 1, "stage": "opd", "train/loss": 0.5})),
    as_files(mutate({"rows": 2, "model": "m"})),
    as_files(mutate(_INPUTS)),
)


def read_run(contents: tuple[bytes, bytes, bytes], directory: Path) -> None:
    from distill.training import resume

    write(directory, "metrics.jsonl", contents[0])
    with run_files.Writer(directory, 1):
        pass
    write(directory, "out.jsonl.partial", contents[0])
    write(directory, "out.jsonl.partial.about", contents[1])
    with contextlib.suppress(UserError):
        run_files.resume_jsonl(directory / "out.jsonl", {"rows": 2})
    path = epath.Path(write(directory, "inputs.json", contents[2]))
    inputs = resume._read_record(path)["inputs"]
    list(resume.find_changes(inputs, _INPUTS["inputs"]))


_SETTINGS = {
    **dict.fromkeys(("model", "model_hash", "rows", "rows_hash", "dtype", "param_dtype"), "x"),
    "tokenizer_hash": "",
    **dict.fromkeys(("top_k", "hidden_size", "responses", "tokens"), 2),
    **{"step": -1, "output": "top", "vocab_size": 9},
}
_SHARD = {"file": "shard-00000.safetensors", "bytes": 9, "responses": 2, "tokens": 3}
_SCORES = {"format": 1, **_SETTINGS, "head_hash": "", "shards": [{**_SHARD, "index_sha256": "x"}]}


@functools.cache
def _get_shard() -> bytes:
    """Returns a shard of two responses."""
    tops = [np.arange(2 * n, dtype=np.int32).reshape(n, 2) for n in (1, 2)]
    scores = [ResponseOutput(top_ids=x, top_logp=-1.0 - x.astype(np.float32)) for x in tops]
    tables = {name: np.zeros((2, n), np.int32) for name, n in (("keys", 4), ("checksums", 2))}
    return wire.encode_outputs(scores, {"fields": "top_ids top_logp"}, tables)


def read_scores(contents: tuple[bytes, bytes], directory: Path) -> None:
    data, path = contents[0], write(directory, "scores.json", contents[1])
    with contextlib.suppress(UserError):
        wire.decode_outputs(data, 9, top_k=2)
    with contextlib.suppress(UserError):
        wire.decode_head(data, 9, 2, "x")
    with contextlib.suppress(UserError):
        index, _ = stored_files.parse_index(io.BytesIO(data), len(data), "scores.json")
        index.read_output(epath.Path(directory), 0, index.fields)
    stored.StoredScorer(str(path.parent), "top")


# What servers of models say.

_TOKEN = {"token": "x", "logprob": -0.5}
_CHOICE = {"index": 0, "finish_reason": "stop", "token_ids": [1, 2], "text": "a"}
_CHOICE |= {"message": {"role": "assistant", "content": "a", "reasoning": "b"}}
_CHOICE |= {"logprobs": {"content": [_TOKEN, _TOKEN], "token_logprobs": [-0.5, -0.5]}}
_REPLY = {"model": "m", "choices": [_CHOICE], "usage": {"completion_tokens": 2}}
_REPLY |= {"prompt_text": "<think>", "prompt_token_ids": [1]}
_MODELS = {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 9, "model_hash": "h"}]}
_ADDRESSES = ("http://a:80", "https://b/v1", "http://me:x@a", "http://[::1]", "http://a:b?c#d")
addresses_of_servers = st.sampled_from(_ADDRESSES).flatmap(
    lambda x: st.just(x) | texts.map(x.__add__)
)


def read_replies(contents: tuple[bytes, bytes, str], directory: Path) -> None:
    models, reply = (http_client.Reply("http://a", 200, {}, body) for body in contents[:2])
    failures = contextlib.suppress(UserError, http_client.BadReply)
    with failures:
        addresses.read_url(contents[2])
    http_client._find_message(reply.body)
    get = mock.patch.object(http_client.Client, "get", lambda _, path, read, **__: read(models))
    with get, failures:
        model = served_model.ServedModel(http_client.ClientOptions(("http://a",)))
        settings = served_model.RequestSettings(Sampling(), 0, True, logprobs=True)
        for path in (served_model.CHAT, served_model.TEXT):
            with failures:
                model._read(reply, served_model.Prompt(path, {}), settings, 5)


PARSERS = {
    "rows": Parser(as_lines(anything), read_rows, 10),
    "rows of JSON": Parser(
        as_files(st.lists(anything, max_size=3)),
        functools.partial(read_rows, name="rows.json"),
        10,
    ),
    "rows of parquet": Parser(
        st.deferred(lambda: fuzzing.mutate_bytes(_get_parquet())),
        functools.partial(read_rows, name="rows.parquet"),
        100,
        has_workers=True,  # `datasets` hashes by way of pickle
    ),
    "columns": Parser(rows, make_examples, 10),
    "messages": Parser(
        st.fixed_dictionaries({"messages": conversations, "tools": tools}), read_messages
    ),
    "templates": Parser(template_texts, render_template, 10),
    "config.json": Parser(config_files, read_config),
    "generation_config.json": Parser(
        as_files(mutate(list_fields("generation_config.json"))), read_generation_config
    ),
    "tokenizer": Parser(tokenizer_files, read_tokenizer, 50),
    "safetensors": Parser(st.tuples(tensor_contents, index_files), read_tensors),
    "adapter": Parser(adapter_files, read_adapter, 10),
    "grades": Parser(answer_pairs, grade),
    "algebra": Parser(answer_pairs, grade_in_process, 100, has_workers=True),
    "verify": Parser(as_lines(sampled_rows | anything), verify),
    "compare": Parser(st.tuples(evaluations, evaluations), compare, 10),
    "evaluation": Parser(
        st.tuples(as_files(mutate({"problems": 1, "x": 2})), as_lines(mutate(_EXAMPLE))),
        resume_evaluation,
    ),
    "problems": Parser(as_lines(anything | task_rows), read_problems),
    "flags": Parser(command_lines, parse_flags, 10),
    "run": Parser(run_contents, read_run),
    "replies": Parser(
        st.tuples(as_files(mutate(_MODELS)), as_files(mutate(_REPLY)), addresses_of_servers),
        read_replies,
    ),
    "scores": Parser(
        st.tuples(
            st.deferred(lambda: fuzzing.mutate_bytes(_get_shard())), as_files(mutate(_SCORES))
        ),
        read_scores,
    ),
}


def read_guarded(name: str, value: Any, directory: Path) -> None:
    """Gives a parser an input in an empty directory. Raises what `fuzzing.guard` does."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    datasets.config.HF_DATASETS_CACHE = directory / "cache"
    with fuzzing.guard(directory, PARSERS[name].has_workers):
        PARSERS[name].read(value, directory)
