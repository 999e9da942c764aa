"""The summary printed before the first step, and its warnings."""

import json
import shutil
import types
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from distill.data import chat
from distill.data.examples import Example
from distill.policy import policy
from distill.runtime import host_memory
from distill.runtime import mesh as mesh_lib
from distill.training import calls, eval_hook, loop, memory, preflight, setup, update
from models.errors import UserError
from models.transformer import Params
from tests.support.paths import ROOT
from tests.support.templates import INSTRUCT


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def config(**changes: Any) -> ConfigDict:
    c = quickstart.get_config("tiny")
    c.mesh.fsdp = 1
    for name, value in changes.items():
        c.update_from_flattened_dict({name.replace("__", "."): value})
    return c


def summarise(c: ConfigDict, alter: Any = lambda params: params) -> list[str]:
    """Returns the lines of a run's summary; `alter` changes the initial trained parameters."""
    run_setup = setup.setup_run(c, mesh_lib.make_mesh(**c.mesh))
    with policy.use(run_setup.student):
        run_setup = setup.load_lora_base(c, run_setup)
        run_setup = setup.load_stage_models(c, run_setup, run_setup.stages[0])
        trained = init_trained(c, run_setup)
        validation = eval_hook.setup_validation(c.eval, run_setup.student, c.seed)
        return list(preflight.make_summary_lines(c, run_setup, validation, alter(trained), False))


def init_trained(c: ConfigDict, run_setup: setup.RunSetup) -> Params:
    if run_setup.student.model.lora:
        return policy.load_or_init_lora(run_setup.student, jax.random.key(0))
    return policy.load(run_setup.student, "float32").params


def get_warnings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("warning: ")]


def test_a_sound_run_has_a_short_summary_without_warnings() -> None:
    lines = summarise(config())
    assert not get_warnings(lines) and len(lines) <= 8 and max(map(len, lines)) < 300
    assert "stops at 382 <|endoftext|>, 384 <|im_end|>" in lines[0]
    assert lines[1].startswith("teacher assets/teacher: 0.7 M parameters")
    assert "ends a turn with <|im_end|>" in lines[2]
    assert sum("⟦what the student writes⟧" in line for line in lines) == 2


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_teacher_with_the_students_weights_is_warned_of(lora: int, dtype: str) -> None:
    c = config(teacher__path="assets/student", student__lora__rank=lora)
    c.teacher.param_dtype = dtype
    (line,) = get_warnings(summarise(c))
    assert line.startswith("warning: teacher (assets/student) has the student's own weights")
    assert "in opd" in line
    add = lambda params: jax.tree.map(lambda x: x + 0.01, params)  # noqa: E731
    assert not get_warnings(summarise(c, add))  # the architectures are still the same


def test_the_initial_student_may_teach_a_later_stage() -> None:
    c = config(teacher__path="assets/student", stages=("sft", "opd"))
    c.sft.max_prompt_tokens, c.sft.max_response_tokens = 60, 52
    assert not get_warnings(summarise(c))


def test_the_student_itself_may_teach_with_a_context() -> None:
    c = config(teacher__path="assets/student")
    c.opd.context.text, c.opd.context.max_tokens = "assets/rows/manual.md", 48
    assert not get_warnings(summarise(c))


def copy_student(directory: Path, **tokenizer: Any) -> str:
    """Copies assets/student with changes to its tokenizer_config.json."""
    shutil.copytree("assets/student", directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **tokenizer}))
    return str(directory)


def test_a_template_that_ends_turns_with_another_token_is_warned_of(tmp_path: Path) -> None:
    """Templates of Base models do, as their tokenizers end texts with <|endoftext|>."""
    path = copy_student(tmp_path / "base", eos_token="<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / "base" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 382}))
    c = config(student__path=path, stages=("sft",))
    c.sft.max_prompt_tokens, c.sft.max_response_tokens = 60, 52
    stop, learned = get_warnings(summarise(c))
    assert stop == (
        "warning: <|im_end|> is no stop token of the student, which will write on after it"
    )
    assert (
        "trained to end with <|endoftext|>, but the template ends a turn with <|im_end|>" in learned
    )


def test_a_format_reward_without_think_blocks_is_warned_of(tmp_path: Path) -> None:
    c = config(student__path=copy_student(tmp_path / "plain", chat_template=INSTRUCT))
    c.opd.reward.format = 0.1
    (line,) = get_warnings(summarise(c))
    assert "knows no think block, so config.opd.reward.format rewards answers without one" in line
    c.opd.reward.format = 0.0
    assert not get_warnings(summarise(c))


def test_a_grader_of_bare_numbers_is_warned_of_where_responses_are_texts() -> None:
    c = config(opd__objective="grpo", opd__samples=4)
    assert not get_warnings(summarise(c))
    c.opd.data.source, c.opd.max_prompt_tokens = "assets/rows/gsm8k.jsonl", 400
    c.opd.max_response_tokens = 60
    (line,) = get_warnings(summarise(c))
    assert "config.opd.reward.grader=arithmetic counts a response as correct only if its" in line
    c.opd.reward.grader = "gsm8k"
    assert not get_warnings(summarise(c))


def test_a_stage_left_on_generated_arithmetic_is_warned_of() -> None:
    c = config(stages=("sft", "opd"), opd__data__source="assets/rows/gsm8k.jsonl")
    for stage in (c.sft, c.opd):
        stage.max_prompt_tokens, stage.max_response_tokens = 400, 60
    lines = [x for x in get_warnings(summarise(c)) if "generated arithmetic" in x]
    assert lines == [
        "warning: sft trains on generated arithmetic, and not on assets/rows/gsm8k.jsonl: each "
        "stage has data of its own (config.sft.data.source)"
    ]
    c.sft.data.source = c.opd.data.source
    assert not [x for x in get_warnings(summarise(c)) if "generated arithmetic" in x]


def test_greedy_samples_are_warned_of() -> None:
    (line,) = get_warnings(summarise(config(opd__sampling__temperature=0.0)))
    assert "config.opd.sampling.temperature=0 samples the likeliest tokens only" in line


def test_a_lora_with_the_rate_of_full_training_is_warned_of() -> None:
    c = config(student__lora__rank=4, opd__optim__learning_rate=2e-5)
    (line,) = get_warnings(summarise(c))
    assert "config.opd.optim.learning_rate=2e-05 is low for a LoRA" in line
    c.opd.optim.learning_rate = 5e-5
    assert not get_warnings(summarise(c))


def test_stages_that_ask_in_other_forms_are_warned_of() -> None:
    c = config(stages=("sft", "opd"))
    c.opd.data.thinking, c.opd.data.template = 0.0, "Q: {question}"
    run_setup = types.SimpleNamespace(
        stages=[types.SimpleNamespace(name=name, c=c[name]) for name in c.stages]
    )
    compare: Any = preflight._compare_stages
    assert not [*compare(run_setup, run_setup.stages[0])]
    lines = [*compare(run_setup, run_setup.stages[1])]
    assert [line.partition(": config.")[0] for line in lines] == [
        "warning: opd asks otherwise than sft"
    ] * 2
    assert "config.opd.data.template='Q: {question}', config.sft.data.template=" in lines[0]
    assert "config.opd.data.thinking=0.0, config.sft.data.thinking=1.0" in lines[1]
    c.opd.data.update(thinking=0.5, template="{question}")  # both modes
    assert not [*compare(run_setup, run_setup.stages[1])]


def test_what_the_teacher_reads_is_shown_beside_the_rows() -> None:
    c = config()
    c.opd.context.text, c.opd.context.max_tokens = "assets/rows/manual.md", 48
    lines = summarise(c)
    manual = Path("assets/rows/manual.md").read_text()[:20]
    shown = [line for line in lines if line.startswith("    with its context the teacher reads: ")]
    assert len(shown) == 2 and all(manual in line for line in shown)
    assert not any(manual in line for line in lines if line not in shown)


def test_an_evaluation_with_other_prompts_is_warned_of() -> None:
    c = config(eval__every=2, eval__limit=4, eval__max_new_tokens=52)
    lines = summarise(c)
    assert not get_warnings(lines) and "the evaluation's prompts have the form of opd's" in lines
    c.opd.data.thinking = 0.0
    (line,) = get_warnings(lines := summarise(c))
    assert "asks otherwise than opd trains" in line and "config.opd.data.template" in line
    theirs, ours = lines[lines.index(line) + 1 :][:2]
    assert theirs == "  evaluation: {question}<|im_end|>⏎<|im_start|>assistant"
    assert ours.endswith("?<|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎"), ours
    rows = "assets/rows/gsm8k.jsonl"
    c = config(eval__every=2, eval__limit=4, eval__max_new_tokens=52, opd__data__source=rows)
    assert not get_warnings(summarise(c))
    c.opd.data.template = "Quick! {question}"
    (line,) = get_warnings(lines := summarise(c))
    theirs, ours = lines[lines.index(line) + 1 :][:2]
    assert theirs == "  evaluation: {question}" and ours.startswith("  opd: Quick! ")


def test_trained_parts_of_a_row_are_marked() -> None:
    tokenizer = chat.load_tokenizer("assets/student")
    assert tokenizer is not None
    prompt, response = (chat.encode(tokenizer, text) for text in ("How many?\n", "6 lamps"))
    example = Example(prompt, response, "", "row", [True] * (len(response) - 1) + [False])
    text_row = preflight.format_example(example, tokenizer, 99, False)
    assert text_row.startswith("How many?⏎⟦6") and text_row.count("⟦") == 1
    *_, last = response
    assert text_row.endswith(f"⟧{tokenizer.decode([last])}")
    coloured = preflight.format_example(example, tokenizer, 99, True)
    assert coloured.startswith("\033[2mHow many?⏎\033[0m\033[32m6") and "⟦" not in coloured
    plain = coloured
    for code in (preflight.GREEN, preflight.FAINT, preflight.RESET_COLOUR):
        plain = plain.replace(code, "")
    assert plain == text_row.replace("⟦", "").replace("⟧", "")
    # Long rows are cut, control codes never reach the terminal, and responses end at the limit.
    long = Example(prompt * 100, chat.encode(tokenizer, "a\033[31mb") * 2, "", "row")
    text = preflight.format_example(long, tokenizer, 99, False)
    assert "more … " in text and len(text) < 1200 and "\033" not in text
    assert preflight.format_example(Example([1], [2, 3, 4], "", ""), None, 2, False) == "1⟦2 3⟧"


def test_estimated_memory_agrees_with_the_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained parameters and optimiser state, on a mesh that shards them."""
    c = config()
    c.mesh.fsdp = 4
    run_setup = setup.setup_run(c, mesh_lib.make_mesh(**c.mesh))
    with policy.use(run_setup.student):
        run_setup = setup.load_lora_base(c, run_setup)
        run_setup = setup.load_stage_models(c, run_setup, run_setup.stages[0])
        trained = init_trained(c, run_setup)
        state = update.init_train_state(run_setup.stages[0].optimizer, trained, 0)
        device = jax.devices()[0]

        def count_bytes(tree: Any) -> int:
            shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
            return sum(s.data.nbytes for s in shards if s.device == device)

        assert calls.count_device_bytes(trained) == count_bytes(trained)
        described = setup.setup_run(c, mesh_lib.make_mesh(**c.mesh))
        (line,) = preflight.check_memory(c, described, mesh_lib.make_mesh(**c.mesh))
        parts = dict(
            part.rsplit(" ", 1) for part in line.partition("(")[2].partition(")")[0].split(", ")
        )
        optimiser = float(parts.get("optimiser", "0"))  # what is rounded to 0.00 is not listed
        assert abs(optimiser * 2**30 - count_bytes(state.opt_state)) < 2**30 / 100
    c.loss_chunk_mib = 2.0**14
    monkeypatch.setattr(memory, "get_free_memory", lambda _: None)
    assert (
        float(next(preflight.check_memory(c, described, mesh_lib.make_mesh(**c.mesh))).split()[2])
        >= 16
    )


def list_memory_lines(c: ConfigDict, free: float, steps_done: int = 0) -> list[str]:
    """Checks the memory of a run on a device with so many GiB free."""
    mesh = mesh_lib.make_mesh(**c.mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "get_free_memory", lambda _: int(free * 2**30))
        return list(preflight.check_memory(c, setup.setup_run(c, mesh, None, steps_done), mesh))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "config.opd: needs at least 0.14 GiB on each device, which has 0.12 free"),
        ({"opd__batch_size": 2**17}, r"sampling \d.*config\.opd\.rollout\.slots"),
        ({"loss_chunk_mib": 2.0**14}, r"logits 16\.0.*config\.opd\.accumulate.*loss_chunk_mib"),
        (
            {"stages": ("sft",), "sft__batch_size": 2**12},
            r"activations \d.*config\.sft\.accumulate",
        ),
        (
            {"stages": ("sft",), "sft__batch_size": 2**16, "student__remat": True},
            r"attention scores \d.*config\.sft\.accumulate",
        ),
        ({"student__lora__rank": 4}, "config.opd: needs at least 0.1"),
    ],
)
def test_too_little_memory_is_refused_with_what_helps(changes: dict[str, Any], words: str) -> None:
    c = config(**changes)
    c.sft.max_prompt_tokens, c.sft.max_response_tokens = 60, 52
    with pytest.raises(UserError, match=words):
        list_memory_lines(c, 0.12)


def test_memory_that_may_not_suffice_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second copy of the gradient may not be needed."""
    monkeypatch.setattr(preflight, "count_device_bytes", lambda _: 2**27)
    lines = list_memory_lines(config(), 0.12)
    assert lines[0].endswith("; it has 0.1")
    assert get_warnings(lines)[0].startswith("warning: a device may have less memory than that")


def test_memory_of_finished_stages_does_not_count() -> None:
    c = config(stages=("sft", "opd"), sft__batch_size=2**14, sft__steps=3)
    c.sft.max_prompt_tokens, c.sft.max_response_tokens = 60, 52
    with pytest.raises(UserError, match=r"config\.sft: needs"):
        list_memory_lines(c, 1)
    assert "memory: about 0.14" in list_memory_lines(c, 1, 3)[0]


def test_a_run_that_does_not_fit_reads_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_to_load(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(host_memory, "measure_free_bytes", lambda: 2**20)
    monkeypatch.setattr(policy, "load", refuse_to_load)
    with pytest.raises(UserError, match=r"config\.opd: needs at least .* which has 0\.00 free"):
        loop.run(config(), tmp_path)
