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
from distill.evaluation import tasks
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rollout import completions
from distill.runtime import run_files
from distill.teachers import local as teacher_lib
from distill.training import calls, sampling_programs
from distill.training import memory as memory_lib
from distill.training.eval_hook import Validation
from distill.training.setup import Plan, Stage
from models.qwen3 import quantised
from models.qwen3.model import Params

ROWS, TOKENS = 2, 60  # rows of a stage that are shown; tokens at each end of a longer part
FRAMES = 8  # rows that an evaluation's prompt is compared with
TRAINED, READ, PLAIN = "\033[32m", "\033[2m", "\033[0m"  # green, faint
GIB = 2**30


def show(c: ConfigDict, plan: Plan, validation: Validation | None, trained: Params) -> None:
    """Says all of it on stderr; in colours on a terminal."""
    colours = sys.stderr.isatty()
    for line in lines(c, plan, validation, trained, colours):
        run_files.say(line)


def lines(
    c: ConfigDict, plan: Plan, validation: Validation | None, trained: Params, colours: bool
) -> Iterator[str]:
    """The lines that `show` says; `trained` is what the student trains, before step 0."""
    student, tokenizer = plan.student, plan.student.tokenizer
    yield f"student {_described(student)}{_adapted(student)}; {_stops(student)}"
    for name, teacher in plan.teachers.items():
        taught = teacher.policy
        yield f"{name} {_described(taught)}, {c[name].param_dtype}; {_stops(taught)}"
        if not teacher.average:
            yield from _teaching(name, taught, plan, trained)
    if tokenizer is not None and tokenizer.chat_template is not None:
        yield from _template(student)
    for stage in plan.stages:
        yield from _rows(stage, c.seed, tokenizer, colours)
        if validation and tokenizer is not None:
            yield from _asked(stage, c.seed, validation, student)
    yield from memory(plan, c, trained)


def _described(p: Policy) -> str:
    return f"{p.path}: {p.config.num_parameters / 1e6:,.1f} M parameters"


def _adapted(p: Policy) -> str:
    return f", LoRA of rank {p.model.lora.rank}" if p.model.lora else ", all trained"


def _stops(p: Policy) -> str:
    """The stop ids, as the tokens that they are."""
    names = [f"{i} {p.tokenizer.decode([i])}" if p.tokenizer else str(i) for i in p.stop_ids]
    return f"stops at {', '.join(names) or 'no token, only at the limit'}"


def _teaching(name: str, taught: Policy, plan: Plan, trained: Params) -> Iterator[str]:
    """Whether the teacher can teach: ends its turns as the student does, and is another model."""
    if lost := policy.further_stops(plan.student, taught):
        yield f"warning: {name} stops at {lost} too, where the student would go on"
    first = next(stage for stage in plan.stages if stage.taught and name in stage.c.teachers)
    if first.c.context.text or first.c.context.column:
        return  # which the student does not read: its own weights may teach it
    if not policy.is_loaded(taught):  # a later stage reads it, and finds another student
        return
    if plan.student.config == taught.config and same(plan.student, trained, taught):
        yield (
            f"warning: {name} ({taught.path}) has the student's own weights: nothing is to be "
            f"learned from it in {first.name}"
        )


def same(student: Policy, trained: Params, taught: Policy) -> bool:
    """Whether a student and a teacher of one architecture have equal weights, in the teacher's
    dtype."""

    @jax.jit
    def equal(theirs: Any, ours: jax.Array) -> jax.Array:
        if not quantised.is_quantised(theirs):
            return jnp.array_equal(ours.astype(theirs.dtype), theirs)
        made = quantised.quantise(ours, theirs.values.dtype.name)
        pairs = zip(jax.tree.leaves(made), jax.tree.leaves(theirs), strict=True)
        return jnp.all(jnp.array([jnp.array_equal(a, b) for a, b in pairs]))

    ours = policy.sampled(student)(trained)
    found = jax.tree.map(equal, taught.params, ours, is_leaf=quantised.is_quantised)
    return all(bool(x) for x in jax.tree.leaves(found))


def _template(student: Policy) -> Iterator[str]:
    """How the template ends a turn, and whether that is what stops and is learned."""
    tokenizer = student.tokenizer
    assert tokenizer is not None
    turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    ids = chat.render(tokenizer, turn, add_generation_prompt=False)
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


def _rows(
    stage: Stage, seed: int, tokenizer: PreTrainedTokenizerBase | None, colours: bool
) -> Iterator[str]:
    """The first rows of a stage, with what is trained of them."""
    s = stage.c
    sign = "" if colours else ", between ⟦ and ⟧ what is trained"
    yield f"{stage.name}: {s.objective}, {s.steps} steps of {s.batch_size} rows{sign}"
    for example in dataset.at(stage.source, 0, ROWS, seed):
        text = picture(example, tokenizer, s.max_response_tokens, colours)
        yield f"  {example.where}: {text}"


def picture(
    example: examples.Example,
    tokenizer: PreTrainedTokenizerBase | None,
    max_response: int,
    colours: bool,
) -> str:
    """A row in one line of text, cut in the middle: what is trained green, or between ⟦ and ⟧."""

    decode = tokenizer.decode if tokenizer else lambda part: " ".join(map(str, part))

    def shown(ids: list[int], trained: bool) -> str:
        cut = len(ids) > 2 * TOKENS
        ends = (ids[:TOKENS], ids[-TOKENS:]) if cut else (ids,)
        return dyed(
            f" … {len(ids) - 2 * TOKENS} more … ".join(map(str, map(decode, ends))), trained
        )

    def dyed(text: str, trained: bool) -> str:
        text = text.encode(errors="replace").decode().replace("\n", "⏎")
        text = "".join(c if c.isprintable() else "·" for c in text)  # no control codes of a row
        if colours:
            return f"{TRAINED if trained else READ}{text}{PLAIN}"
        return f"⟦{text}⟧" if trained else text

    response = example.response[:max_response]
    parts = [shown(example.prompt, False)]
    learned, begin = example.trained or [True] * len(response), 0
    for at in range(1, len(response) + 1):
        if at == len(response) or learned[at] != learned[begin]:
            parts.append(shown(response[begin:at], learned[begin]))
            begin = at
    if not response:
        parts.append(dyed("what the student writes", True))
    return "".join(parts)


def _asked(stage: Stage, seed: int, validation: Validation, student: Policy) -> Iterator[str]:
    """Whether an evaluation puts its questions as the stage's rows do: the same before and after.

    A document has no prompt; of rows in both modes it is enough that some are like it.
    """
    (where, row), settings = validation.rows[0], validation.settings
    put = [(where, tasks.put(validation.c.benchmark, row))]
    ids = completions.prompts(student, put, settings["thinking"], settings["max_new_tokens"])[0]
    assert student.tokenizer is not None
    before, question, after = str(student.tokenizer.decode(ids)).partition(str(row.get("question")))
    rows = dataset.at(stage.source, 0, FRAMES, seed)
    rows = [example for example in rows if len(example.prompt) > 1]
    if not question or not rows:
        return
    texts = [str(student.tokenizer.decode(example.prompt)) for example in rows]
    lead, _, tail = stage.c.data.template.partition("{question}")
    framed = before.endswith(lead) and after.startswith(tail)
    if framed and any(text.startswith(before) and text.endswith(after) for text in texts):
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


def memory(plan: Plan, c: ConfigDict, trained: Params) -> Iterator[str]:
    """About how much a device will hold in the stage that needs most, counted by shapes and not
    measured; a warning if it has less. What the run keeps is exact, activations are those that
    rematerialisation keeps.
    """
    parts = max((_parts(stage, plan, c, trained) for stage in plan.stages), key=_total)
    told = ", ".join(f"{name} {n / GIB:.2f}" for name, n in parts.items() if n)
    total, limit = _total(parts), _limit()
    has = f"; it has {limit / GIB:.1f}" if limit else ""
    yield f"memory: about {total / GIB:.2f} GiB a device ({told}){has}"
    if limit and total > limit:
        yield "warning: that is more than a device has; more devices, accumulate, or fewer slots"
    if c.teacher_mesh.devices:
        size = max(sum(_apart(stage, plan, c, trained).values()) for stage in plan.stages)
        yield f"memory of those of config.teacher_mesh: {size / GIB:.2f} GiB and activations"


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _models(stage: Stage, plan: Plan, c: ConfigDict, trained: Params) -> calls.Models:
    """What a stage keeps, in the dtypes that it reads them in."""
    teachers = {name: plan.teachers[name] for name in stage.c.teachers if stage.taught}
    taught = {name: _read(of.policy, of.c.param_dtype) for name, of in teachers.items()}
    reference = plan.reference if stage.loss.reference else None
    if reference:
        own = teacher_lib.is_base(plan.student)
        reference = None if own else _read(reference, c.student.param_dtype)
    return calls.Models(plan.student, trained, taught, reference)


def _apart(stage: Stage, plan: Plan, c: ConfigDict, trained: Params) -> dict[str, int]:
    """Bytes that a stage keeps on each device that is not the student's, by what they are of."""
    home, models = policy.mesh_of(plan.student), _models(stage, plan, c, trained)
    read = (*models.teachers.values(), *((models.reference,) if models.reference else ()))
    there = next((mesh for x in read if (mesh := policy.mesh_of(x)) != home), None)
    return memory_lib.held(c, models, stage.c, there) if there else {}


def _parts(stage: Stage, plan: Plan, c: ConfigDict, trained: Params) -> dict[str, float]:
    """Bytes that a device of the student's holds in a stage, by what they are of."""
    models = _models(stage, plan, c, trained)
    found: dict[str, float] = {**memory_lib.held(c, models, stage.c)}
    if stage.sampled:
        room = cache_room(c, plan, stage, trained)
        sampler = sampling_programs.of_stage(c, stage.c, stage.sampled, models, room)
        found["sampling"] = sampler.copy + sampler.cache
    update = memory_lib.training(c, stage.c, stage.sampled, models, stage.rows)
    if "sampling" in found and not stage.c.rollout.ahead:  # the one after the other
        fuller = max(found.pop("sampling"), sum(update.values()))
        return {**found, "sampling or updates": fuller}
    return {**found, **update}


def cache_room(c: ConfigDict, plan: Plan, stage: Stage, trained: Params) -> int | None:
    """Tokens that the sampler's cache could hold; None where a device does not say what it has."""
    limit = _limit()
    if limit is None:
        return None
    models = _models(stage, plan, c, trained)
    return memory_lib.cache_room(c, stage.c, stage.sampled, models, stage.rows, limit)


def _read(p: Policy, param_dtype: str) -> Policy:
    """A policy as it is when its stage has read it: shapes will do."""
    if policy.is_loaded(p):
        return p
    return dataclasses.replace(p, params=policy.loaded(p, param_dtype))


def _limit() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None
