"""The responses that a stage learns from, to be scored before it begins."""

import itertools

from ml_collections import ConfigDict

from distill.data import chat, dataset, teacher_context
from distill.data.examples import Example
from distill.evaluation.storing import Responses
from distill.policy import hub
from distill.training import stages
from models.errors import UserError, name_key


def open_stage_responses(c: ConfigDict, name: str) -> Responses:
    """Opens the traces of stage `name` ("": the last) as the stage reads them: with its columns,
    template, thinking mode, turns and samples, the student's tokenizer and the teacher's context.

    Raises:
      UserError: naming the key at fault, if the stage has no traces or no end of them.
    """
    if not c.stages:
        raise UserError("config.stages: must name at least one stage")
    name = name or c.stages[-1]
    if name not in c.stages:
        raise UserError(f"--stage={name}: is not among config.stages={tuple(c.stages)}")
    s, m = c[name], c.student
    _, sampled_rows = stages.resolve_objective(name, s)
    if sampled_rows == s.batch_size:
        raise UserError(
            f"config.{name}: the student writes all responses of {s.objective} while it trains; "
            f"config.{name}.on_policy_share=0 reads stored ones"
        )
    if not m.path:
        raise UserError("config.student.path: name a model directory")
    with name_key("config.student.path", m.path):
        tokenizer = chat.load_tokenizer(hub.resolve_tokenizer_dir(m.tokenizer or m.path))
    context = teacher_context.load_context(s.context, f"config.{name}.context")
    sources = []
    with stages.name_stage(name):
        source_names = dataset.list_source_names(s.data)
    for source_name in source_names:
        data = s.data.copy_and_resolve_references().unlock()
        data.source, data.mixture = source_name, ()
        # All rows are read here. Bad ones that are skipped are then no part of the source.
        data.check_rows = 2**62 if data.on_bad_row == "skip" else 0
        with stages.name_stage(name):
            source = dataset.load_source(data, tokenizer, c.seed, True, context=context)
        if not source.size:
            raise UserError(f"config.{name}.data.max_rows: set it, {source_name} has no end")
        sources.append(source)
    ends = list(itertools.accumulate(source.size for source in sources))

    def read(row: int) -> list[Example]:
        number = next(i for i, end in enumerate(ends) if row < end)
        x = sources[number].read_example(row - ends[number] + sources[number].size)
        return [x, *([x.non_thinking_example] if x.non_thinking_example else [])]

    return Responses(", ".join(source_names), ends[-1], read)
