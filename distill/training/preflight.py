"""What a run is about to do, told once before step 0: models, stop tokens, prompts, what is trained
of two rows, memory. What would go wrong in silence is a line that begins with "warning:".
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from distill.data import chat, dataset, examples
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import run_files
from distill.teachers import local as teacher_lib
from distill.training import calls, sampling_programs
from distill.training import memory as memory_lib
from distill.training.eval_hook import ValidationSetup
from distill.training.setup import RunSetup, StageSetup
from models.layers import quantised
from models.transformer import Params

NUM_ROWS, NUM_END_TOKENS = (
    2,
    60,
)  # rows of a stage that are shown; tokens at each end of a longer part
NUM_COMPARED_ROWS = 8  # rows that an evaluation's prompt is compared with
GREEN, FAINT, RESET_COLOUR = "\033[32m", "\033[2m", "\033[0m"  # green, faint
GIB = 2**30


def print_summary(
    c: ConfigDict, run_setup: RunSetup, validation: ValidationSetup | None, trained: Params
) -> None:
    """Says all of it on stderr; in colours on a terminal."""
    colours = sys.stderr.isatty()
    for line in make_summary_lines(c, run_setup, validation, trained, colours):
        run_files.log_line(line)


def make_summary_lines(
    c: ConfigDict,
    run_setup: RunSetup,
    validation: ValidationSetup | None,
    trained: Params,
    colours: bool,
) -> Iterator[str]:
    """The lines that `show` says; `trained` is what the student trains, before step 0."""
    student, tokenizer = run_setup.student, run_setup.student.tokenizer
    about = f"{_describe_policy(student)}{_describe_training(student)}"
    yield f"student {about}; {_describe_stops(student)}"
    for name, teacher in run_setup.teachers.items():
        teacher_policy = teacher.policy
        about = f"{_describe_policy(teacher_policy)}, {c[name].param_dtype}"
        yield f"{name} {about}; {_describe_stops(teacher_policy)}"
        if not teacher.is_ema:
            yield from _check_teacher(name, teacher_policy, run_setup, trained)
    if tokenizer is not None and tokenizer.chat_template is not None:
        yield from _check_template(student)
    for stage in run_setup.stages:
        yield from _describe_rows(stage, c.seed, tokenizer, colours)
        if validation and tokenizer is not None:
            yield from _compare_eval_prompts(stage, c.seed, validation, student)
    yield from estimate_memory(run_setup, c, trained)


def _describe_policy(model: Policy) -> str:
    return f"{model.path}: {model.config.num_parameters / 1e6:,.1f} M parameters"


def _describe_training(student: Policy) -> str:
    return f", LoRA of rank {student.model.lora.rank}" if student.model.lora else ", all trained"


def _describe_stops(model: Policy) -> str:
    """The stop ids, as the tokens that they are."""
    names = [
        f"{i} {model.tokenizer.decode([i])}" if model.tokenizer else str(i) for i in model.stop_ids
    ]
    return f"stops at {', '.join(names) or 'no token, only at the limit'}"


def _check_teacher(
    name: str, teacher: Policy, run_setup: RunSetup, trained: Params
) -> Iterator[str]:
    """Whether the teacher can teach: ends its turns as the student does, and is another model."""
    if further_stops := policy.find_extra_stop_ids(run_setup.student, teacher):
        yield f"warning: {name} stops at {further_stops} too, where the student would go on"
    first = next(
        stage for stage in run_setup.stages if stage.needs_teacher and name in stage.c.teachers
    )
    if first.c.context.text or first.c.context.column:
        return  # which the student does not read: its own weights may teach it
    if not policy.is_loaded(teacher):  # a later stage reads it, and finds another student
        return
    if run_setup.student.config == teacher.config and has_same_weights(
        run_setup.student, trained, teacher
    ):
        yield (
            f"warning: {name} ({teacher.path}) has the student's own weights: nothing is to be "
            f"learned from it in {first.name}"
        )


def has_same_weights(student: Policy, trained: Params, teacher: Policy) -> bool:
    """Whether a student and a teacher of one architecture have equal weights, in the teacher's
    dtype."""

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
    """How the template ends a turn, and whether that is what stops and is learned."""
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
    """The first rows of a stage, with what is trained of them."""
    s = stage.c
    sign = "" if colours else ", between ⟦ and ⟧ what is trained"
    yield f"{stage.name}: {s.objective}, {s.steps} steps of {s.batch_size} rows{sign}"
    for example in dataset.get_step_examples(stage.source, 0, NUM_ROWS, seed):
        text = format_example(example, tokenizer, s.max_response_tokens, colours)
        yield f"  {example.where}: {text}"


def format_example(
    example: examples.Example,
    tokenizer: PreTrainedTokenizerBase | None,
    max_response: int,
    colours: bool,
) -> str:
    """A row in one line of text, cut in the middle: what is trained green, or between ⟦ and ⟧."""

    decode = tokenizer.decode if tokenizer else lambda part: " ".join(map(str, part))

    def format_tokens(ids: list[int], trained: bool) -> str:
        cut = len(ids) > 2 * NUM_END_TOKENS
        ends = (ids[:NUM_END_TOKENS], ids[-NUM_END_TOKENS:]) if cut else (ids,)
        return mark_text(
            f" … {len(ids) - 2 * NUM_END_TOKENS} more … ".join(map(str, map(decode, ends))), trained
        )

    def mark_text(text: str, trained: bool) -> str:
        text = text.encode(errors="replace").decode().replace("\n", "⏎")
        text = "".join(c if c.isprintable() else "·" for c in text)  # no control codes of a row
        if colours:
            return f"{GREEN if trained else FAINT}{text}{RESET_COLOUR}"
        return f"⟦{text}⟧" if trained else text

    response = example.response[:max_response]
    parts = [format_tokens(example.prompt, False)]
    trained_flags, start = example.trained_mask or [True] * len(response), 0
    for at in range(1, len(response) + 1):
        if at == len(response) or trained_flags[at] != trained_flags[start]:
            parts.append(format_tokens(response[start:at], trained_flags[start]))
            start = at
    if not response:
        parts.append(mark_text("what the student writes", True))
    return "".join(parts)


def _compare_eval_prompts(
    stage: StageSetup, seed: int, validation: ValidationSetup, student: Policy
) -> Iterator[str]:
    """Whether an evaluation puts its questions as the stage's rows do: the same before and after.

    A document has no prompt; of rows in both modes it is enough that some are like it.
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
        yield f"evaluation asks as {stage.name} trains"
        return
    begins = before.endswith(lead) and texts[0].startswith(before)
    at = -len(after) - 20 if begins else 0
    end = len(before) + 20 if at == 0 else None
    yield (
        f"warning: evaluation asks otherwise than {stage.name} trains, with "
        f"{before if at == 0 else after!r} and not {texts[0][at:end]!r} "
        f"(config.{stage.name}.data.template, data.thinking)"
    )


def estimate_memory(run_setup: RunSetup, c: ConfigDict, trained: Params) -> Iterator[str]:
    """About how much a device will hold in the stage that needs most, counted by shapes and not
    measured; a warning if it has less. What the run keeps is exact, activations are those that
    rematerialisation keeps.
    """
    bytes_by_part = max(
        (_estimate_stage_bytes(stage, run_setup, c, trained) for stage in run_setup.stages),
        key=_sum_bytes,
    )
    parts_text = ", ".join(f"{name} {n / GIB:.2f}" for name, n in bytes_by_part.items() if n)
    total, limit = _sum_bytes(bytes_by_part), _get_memory_limit()
    has = f"; it has {limit / GIB:.1f}" if limit else ""
    yield f"memory: about {total / GIB:.2f} GiB a device ({parts_text}){has}"
    if limit and total > limit:
        yield "warning: that is more than a device has; more devices, accumulate, or fewer slots"
    if c.teacher_mesh.devices:
        size = max(
            sum(_count_teacher_mesh_bytes(stage, run_setup, c, trained).values())
            for stage in run_setup.stages
        )
        yield f"memory of those of config.teacher_mesh: {size / GIB:.2f} GiB and activations"


def _sum_bytes(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _describe_models(
    stage: StageSetup, run_setup: RunSetup, c: ConfigDict, trained: Params
) -> calls.StageModels:
    """What a stage keeps, in the dtypes that it reads them in."""
    teachers = {name: run_setup.teachers[name] for name in stage.c.teachers if stage.needs_teacher}
    teacher_policies = {
        name: _with_param_shapes(of.policy, of.c.param_dtype) for name, of in teachers.items()
    }
    reference = run_setup.reference if stage.loss.reference else None
    if reference:
        is_base = teacher_lib.is_base(run_setup.student)
        reference = None if is_base else _with_param_shapes(reference, c.student.param_dtype)
    return calls.StageModels(run_setup.student, trained, teacher_policies, reference)


def _count_teacher_mesh_bytes(
    stage: StageSetup, run_setup: RunSetup, c: ConfigDict, trained: Params
) -> dict[str, int]:
    """Bytes that a stage keeps on each device that is not the student's, by what they are of."""
    student_mesh, models = (
        policy.get_mesh(run_setup.student),
        _describe_models(stage, run_setup, c, trained),
    )
    read_models = (*models.teachers.values(), *((models.reference,) if models.reference else ()))
    teacher_mesh = next(
        (mesh for x in read_models if (mesh := policy.get_mesh(x)) != student_mesh), None
    )
    return memory_lib.count_resident_bytes(c, models, stage.c, teacher_mesh) if teacher_mesh else {}


def _estimate_stage_bytes(
    stage: StageSetup, run_setup: RunSetup, c: ConfigDict, trained: Params
) -> dict[str, float]:
    """Bytes that a device of the student's holds in a stage, by what they are of."""
    models = _describe_models(stage, run_setup, c, trained)
    stage_bytes: dict[str, float] = {**memory_lib.count_resident_bytes(c, models, stage.c)}
    if stage.sampled_rows:
        cache_capacity = compute_cache_capacity(c, run_setup, stage, trained)
        sampler = sampling_programs.make_stage_sampler(
            c, stage.c, stage.sampled_rows, models, cache_capacity
        )
        stage_bytes["sampling"] = sampler.weight_bytes + sampler.cache_bytes
    update_bytes = memory_lib.estimate_update_bytes(
        c, stage.c, stage.sampled_rows, models, stage.microbatch_rows
    )
    if "sampling" in stage_bytes and not stage.c.rollout.asynchronous:  # the one after the other
        fuller = max(stage_bytes.pop("sampling"), sum(update_bytes.values()))
        return {**stage_bytes, "sampling or updates": fuller}
    return {**stage_bytes, **update_bytes}


def compute_cache_capacity(
    c: ConfigDict, run_setup: RunSetup, stage: StageSetup, trained: Params
) -> int | None:
    """Tokens that the sampler's cache could hold; None where a device does not say what it has."""
    limit = _get_memory_limit()
    if limit is None:
        return None
    models = _describe_models(stage, run_setup, c, trained)
    return memory_lib.compute_cache_capacity(
        c, stage.c, stage.sampled_rows, models, stage.microbatch_rows, limit
    )


def _with_param_shapes(model: Policy, param_dtype: str) -> Policy:
    """A policy as it is when its stage has read it: shapes will do."""
    if policy.is_loaded(model):
        return model
    return dataclasses.replace(model, params=policy.make_abstract_params(model, param_dtype))


def _get_memory_limit() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None
