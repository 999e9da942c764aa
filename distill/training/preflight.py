"""Memory, compared before weights are read; and the summary printed before step 0: models, stop
tokens, example rows with the trained parts.

A line that begins with "warning:" names a problem that would cause no error.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from distill.data import chat, dataset, examples
from distill.data.template import describe_template
from distill.policy import compatibility, policy
from distill.policy.policy import Policy
from distill.runtime import failures, run_files
from distill.runtime import mesh as mesh_lib
from distill.teachers import external
from distill.training import memory, response_limits
from distill.training.calls import count_device_bytes
from distill.training.eval_hook import ValidationSetup
from distill.training.setup import RunSetup, StageSetup
from models.errors import UserError
from models.layers import quantised
from models.transformer import Params

NUM_ROWS = 2  # shown of each stage
NUM_END_TOKENS = 60  # shown at each end of a part that is cut
NUM_COMPARED_ROWS = 8  # compared with an evaluation's prompt
NUM_SHOWN_CHARACTERS = 100  # of what differs between them
MIN_LORA_RATE = 5e-5  # below it a LoRA hardly learns
GREEN, FAINT, RESET_COLOUR = "\033[32m", "\033[2m", "\033[0m"
GIB = 2**30
# Part of the estimate -> the phase of a step that takes it; all others stay in memory.
PHASES = {
    **dict.fromkeys(("gradient", "activations", "attention scores", "logits"), "updating"),
    "sampling": "sampling",
}


def print_summary(
    c: ConfigDict, run_setup: RunSetup, validation: ValidationSetup | None, trained: Params
) -> None:
    """Prints the summary to stderr, in colour on a terminal."""
    colours = sys.stderr.isatty()
    for line in make_summary_lines(c, run_setup, validation, trained, colours):
        run_files.log_line(line, (GREEN, FAINT, RESET_COLOUR))


def make_summary_lines(
    c: ConfigDict,
    run_setup: RunSetup,
    validation: ValidationSetup | None,
    trained: Params,
    colours: bool,
) -> Iterator[str]:
    """Yields the lines of the summary; `trained` are the student's trained parameters at step 0."""
    student, tokenizer = run_setup.student, run_setup.student.tokenizer
    training = f"LoRA of rank {student.model.lora.rank}" if student.model.lora else "all trained"
    training += f", attention by {student.model.kernel}"
    yield f"student {_describe_policy(student)}, {training}; {_describe_stops(student)}"
    for name, teacher in run_setup.teachers.items():
        described, dtype = _describe_policy(teacher.policy), c[name].param_dtype
        yield f"{name} {described}, {dtype}; {_describe_stops(teacher.policy)}"
        if not teacher.is_ema:
            yield from _check_teacher(name, teacher.policy, run_setup, trained)
    outside = {t.name: t for stage in run_setup.stages for t in stage.external}
    for name, teacher in outside.items():
        yield f"{name} {teacher.path}: {external.describe_info(teacher.info)}"
    if tokenizer is not None and tokenizer.chat_template is not None:
        yield from _check_template(student)
    for stage in run_setup.stages:
        yield from _describe_rows(stage, c.seed, tokenizer, colours)
        yield from list_stage_warnings(c, run_setup, stage, validation)


def list_stage_warnings(
    c: ConfigDict, run_setup: RunSetup, stage: StageSetup, validation: ValidationSetup | None
) -> Iterator[str]:
    """Warns of settings that are valid, but hardly meant."""
    student, tokenizer = run_setup.student, run_setup.student.tokenizer
    yield from _check_stage(stage)
    yield from _compare_stages(run_setup, stage)
    rate = stage.c.optim.learning_rate
    if student.model.lora and rate < MIN_LORA_RATE and not stage.loss.reward:
        yield (
            f"warning: config.{stage.name}.optim.learning_rate={rate:g} is low for a LoRA, which "
            "needs a higher one than full training: 1e-4 and more are usual"
        )
    others = [other.c.data.source for other in run_setup.stages if other is not stage]
    others = [name for name in others if name != "arithmetic"]
    if stage.c.data.source == "arithmetic" and not stage.c.data.mixture and others:
        yield (
            f"warning: {stage.name} trains on generated arithmetic, and not on {others[0]}: each "
            f"stage has data of its own (config.{stage.name}.data.source)"
        )
    if stage.c.reward.format and not describe_template(tokenizer).has_modes:
        yield (
            f"warning: the chat template of {student.tokenizer_dir} knows no think block, so "
            f"config.{stage.name}.reward.format rewards answers without one (but for rows with "
            "thinking: true)"
        )
    if validation and tokenizer is not None:
        yield from _compare_eval_prompts(stage, c.seed, validation, student)


def _describe_policy(model: Policy) -> str:
    return f"{model.path}: {model.config.num_parameters / 1e6:,.1f} M parameters"


def _describe_stops(model: Policy) -> str:
    """Returns the stop ids and their tokens as text."""
    names = [
        f"{i} {model.tokenizer.decode([i])}" if model.tokenizer else str(i) for i in model.stop_ids
    ]
    return f"stops at {', '.join(names) or 'no token, only at the limit'}"


def _check_teacher(
    name: str, teacher: Policy, run_setup: RunSetup, trained: Params
) -> Iterator[str]:
    """Warns if a teacher has stop ids that the student lacks, or the student's own weights."""
    if further_stops := compatibility.find_extra_stop_ids(run_setup.student, teacher):
        yield f"warning: {name} stops at {further_stops} too, where the student would go on"
    first = next(stage for stage in run_setup.stages if name in stage.local_teachers)
    if first.c.context.text or first.c.context.column:
        return  # the student does not read the context, so its own weights may teach it
    if len(first.c.teachers) > 1:
        return  # beside others, it holds the student to what it was
    if not policy.is_loaded(teacher):  # loaded by a later stage, when the student has changed
        return
    if run_setup.student.config == teacher.config and has_same_weights(
        run_setup.student, trained, teacher
    ):
        yield (
            f"warning: {name} ({teacher.path}) has the student's own weights: the student can "
            f"learn nothing from it in {first.name}"
        )


def has_same_weights(student: Policy, trained: Params, teacher: Policy) -> bool:
    """Returns true if a student and a teacher of the same architecture have equal weights in the
    teacher's dtype."""

    @jax.jit
    def is_equal(theirs: Any, ours: jax.Array) -> jax.Array:
        if not quantised.is_quantised(theirs):
            return jnp.array_equal(ours.astype(theirs.dtype), theirs)
        quantised_ours = quantised.quantise_kernel(ours, theirs.values.dtype.name)
        pairs = zip(jax.tree.leaves(quantised_ours), jax.tree.leaves(theirs), strict=True)
        return jnp.all(jnp.array([jnp.array_equal(a, b) for a, b in pairs]))

    ours = policy.make_sampler_params_fn(student)(trained)
    equal_leaves = jax.tree.map(is_equal, teacher.params, ours, is_leaf=quantised.is_quantised)
    return all(bool(x) for x in jax.tree.leaves(equal_leaves))


def _check_template(student: Policy) -> Iterator[str]:
    """Yields the token that ends a turn in the template; warns if the student does not stop at it
    or is trained on another."""
    tokenizer = student.tokenizer
    assert tokenizer is not None
    turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    ids = chat.render_messages(tokenizer, turn, add_generation_prompt=False)
    ends = [i for i in ids if i in tokenizer.added_tokens_decoder]
    token = tokenizer.decode([ends[-1]]) if ends else None
    yield f"chat template of {student.tokenizer_dir} ends a turn with {token or 'no special token'}"
    if ends and ends[-1] not in student.stop_ids:
        yield f"warning: {token} is no stop token of the student, which will write on after it"
    if ends and ends[-1] != tokenizer.eos_token_id:
        yield (
            f"warning: traces are trained to end with {tokenizer.eos_token}, but the template ends "
            f"a turn with {token}; config.student.tokenizer=TEACHER takes another's"
        )


def _describe_rows(
    stage: StageSetup, seed: int, tokenizer: PreTrainedTokenizerBase | None, colours: bool
) -> Iterator[str]:
    """Yields the first rows of a stage, with the trained parts marked."""
    s = stage.c
    legend = "" if colours else ", trained parts between ⟦ and ⟧"
    yield (
        f"{stage.name}: objective {s.objective}, {s.steps:,} steps of {s.batch_size:,} rows, "
        f"prompts of up to {s.max_prompt_tokens:,} and responses of up to "
        f"{s.max_response_tokens:,} tokens{response_limits.describe_schedule(s)}{legend}"
    )
    for example in dataset.get_step_examples(stage.source, 0, NUM_ROWS, seed):
        text = format_example(example, tokenizer, s.max_response_tokens, colours)
        yield f"  {example.where}: {text}"
        if example.teacher_prompt is not None:
            theirs = dataclasses.replace(example, prompt=example.teacher_prompt)
            text = format_example(theirs, tokenizer, s.max_response_tokens, colours)
            yield f"    with its context the teacher reads: {text}"


def _check_stage(stage: StageSetup) -> Iterator[str]:
    """Warns of settings that are valid, but with which a stage can hardly learn."""
    s, prefix = stage.c, f"config.{stage.name}"
    sources = [name for name, _ in s.data.mixture] or [s.data.source]
    others = [name for name in sources if name != "arithmetic"]
    if stage.loss.reward and s.reward.correct and s.reward.grader == "arithmetic" and others:
        yield (
            f"warning: {prefix}.reward.grader=arithmetic counts a response as correct only if its "
            f"final text is one whole number and nothing else, and {others[0]} is no generated "
            "arithmetic; graders that find the answer in a text are math, gsm8k and others"
        )
    if stage.sampled_rows and not s.sampling.temperature:
        yield (
            f"warning: {prefix}.sampling.temperature=0 samples the likeliest tokens only, so the "
            "student is corrected nowhere else; 1 is usual"
        )


def _compare_stages(run_setup: RunSetup, stage: StageSetup) -> Iterator[str]:
    """Warns if a stage asks in another form than the one before it."""
    number = next(i for i, other in enumerate(run_setup.stages) if other.name == stage.name)
    if not number:
        return
    before = run_setup.stages[number - 1]
    ours, theirs = stage.c.data, before.c.data
    # A stage of both modes has what either of them teaches.
    keys = ["template"] if ours.template != theirs.template else []
    keys += ["thinking"] if {ours.thinking, theirs.thinking} == {0, 1} else []
    for key in keys:
        yield (
            f"warning: {stage.name} asks otherwise than {before.name}: "
            f"config.{stage.name}.data.{key}={ours[key]!r}, "
            f"config.{before.name}.data.{key}={theirs[key]!r}"
        )


def escape_line(text: str) -> str:
    """Returns a text as one line without control codes."""
    text = text.encode(errors="replace").decode().replace("\n", "⏎")
    return "".join(c if c.isprintable() else "·" for c in text)


def format_example(
    example: examples.Example,
    tokenizer: PreTrainedTokenizerBase | None,
    max_response: int,
    colours: bool,
) -> str:
    """Returns a row as one line, with long parts cut in the middle and trained parts in green or
    between ⟦ and ⟧."""
    decode = tokenizer.decode if tokenizer else lambda part: " ".join(map(str, part))

    def format_tokens(ids: list[int], trained: bool) -> str:
        cut = len(ids) > 2 * NUM_END_TOKENS
        ends = (ids[:NUM_END_TOKENS], ids[-NUM_END_TOKENS:]) if cut else (ids,)
        return mark_text(
            f" … {len(ids) - 2 * NUM_END_TOKENS} more … ".join(map(str, map(decode, ends))), trained
        )

    def mark_text(text: str, trained: bool) -> str:
        text = escape_line(text)
        if colours:
            return f"{GREEN if trained else FAINT}{text}{RESET_COLOUR}"
        return f"⟦{text}⟧" if trained else text

    response = example.response[:max_response]
    parts = [format_tokens(example.prompt, False)]
    trained_flags, start = example.trained_mask or [True] * len(response), 0
    for end in range(1, len(response) + 1):
        if end == len(response) or trained_flags[end] != trained_flags[start]:
            parts.append(format_tokens(response[start:end], trained_flags[start]))
            start = end
    if not response:
        parts.append(mark_text("what the student writes", True))
    return "".join(parts)


def _compare_eval_prompts(
    stage: StageSetup, seed: int, validation: ValidationSetup, student: Policy
) -> Iterator[str]:
    """Warns if an evaluation's prompts differ from the stage's in the text before or after the
    question.

    Rows without a prompt do not count. If rows are in both thinking modes, it suffices that one
    matches.
    """
    _, row = validation.rows[0]
    ids = validation.prompts[0]
    assert student.tokenizer is not None
    before, question, after = str(student.tokenizer.decode(ids)).partition(str(row.get("question")))
    rows = dataset.get_step_examples(stage.source, 0, NUM_COMPARED_ROWS, seed)
    rows = [example for example in rows if len(example.prompt) > 1]
    if not question or not rows:
        return
    texts = [str(student.tokenizer.decode(example.prompt)) for example in rows]
    lead, _, tail = stage.c.data.template.partition("{question}")
    matches_template = before.endswith(lead) and after.startswith(tail)
    if matches_template and any(text.startswith(before) and text.endswith(after) for text in texts):
        yield f"the evaluation's prompts have the form of {stage.name}'s"
        return
    yield (
        f"warning: evaluation asks otherwise than {stage.name} trains "
        f"(config.{stage.name}.data.template, data.thinking); its prompt and {stage.name}'s differ:"
    )
    if before.endswith(lead) and texts[0].startswith(before):  # they end differently
        same = _count_common(after[::-1], texts[0][::-1])
        parts = [f"{{question}}{after}", texts[0]]
        parts = [part[: len(part) - same][-NUM_SHOWN_CHARACTERS:] for part in parts]
    else:
        same = _count_common(before, texts[0])
        parts = [f"{before}{{question}}", texts[0]]
        parts = [part[same:][:NUM_SHOWN_CHARACTERS] for part in parts]
    for name, part in zip(("evaluation", stage.name), parts, strict=True):
        yield f"  {name}: {escape_line(part)}"


def _count_common(a: str, b: str) -> int:
    """Returns the number of characters with which both texts begin."""
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    )


def check_memory(
    c: ConfigDict,
    run_setup: RunSetup,
    mesh: Mesh,
    steps_done: int = 0,
    memory_limit: float | None = None,
) -> Iterator[str]:
    """Yields the estimated GiB per device of the stage that needs most, of those that are left, and
    a warning if the device may have less. Call it before any weight is loaded.

    Args:
      memory_limit: bytes of a device that is not here; None: of this process's devices.

    Raises:
      UserError: if a device has less than what is certainly taken, naming the keys that help.
    """
    student, free = run_setup.student, memory_limit
    if memory_limit is None:
        free, memory_limit = memory.get_free_memory(mesh), memory.get_memory_limit()
    trained = mesh_lib.make_abstract_params(student.config, mesh, student.model.lora)
    stages = [
        memory.describe_stage(c, run_setup, stage, trained)
        for stage in run_setup.stages
        if stage.end_step > steps_done
    ]
    if not stages:
        return
    sizes, stage = max(
        ((memory.estimate_stage_bytes(stage, memory_limit), stage) for stage in stages),
        key=lambda pair: sum(pair[0].values()),
    )
    parts = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size / GIB > 0.005
    )
    total, has = sum(sizes.values()), f"; it has {free / GIB:.1f}" if free else ""
    # XLA may add the gradient of a micro-batch to the sum as it arises.
    certain = total - (0 if stage.has_single_microbatch else count_device_bytes(trained))
    largest = max(sizes, key=lambda name: sizes[name])
    knobs = ", ".join(
        f"config.{key.replace('STAGE', stage.name)}"
        for key in failures.KNOBS[PHASES.get(largest, "loading weights")]
    )
    if free is not None and certain > free:
        raise UserError(
            f"config.{stage.name}: needs at least {certain / GIB:.2f} GiB on each device, which "
            f"has {free / GIB:.2f} free ({parts}); less is needed with other values of {knobs}"
        )
    yield f"memory: about {total / GIB:.2f} GiB a device ({parts}){has}"
    if free is not None and total > free:
        yield f"warning: a device may have less memory than that; what helps: {knobs}"
    if c.teacher_mesh.devices:
        size = max(memory.count_teacher_mesh_bytes(stage) for stage in stages)
        if free is not None and size > free:
            raise UserError(
                f"config.teacher_mesh: the weights take {size / GIB:.2f} GiB on each device, which "
                f"has {free / GIB:.2f} free; use more devices, or teacher.param_dtype=int8"
            )
        yield f"memory of config.teacher_mesh: {size / GIB:.2f} GiB a device, plus activations"
