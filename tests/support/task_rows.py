"""Strategies of rows in the published forms of benchmarks, right and wrong ones."""

from hypothesis import strategies as st

from tests.support import fuzzing
from tests.support.fuzzing import scalars, texts

problem_rows = st.fixed_dictionaries(
    {"question": texts, "answer": scalars}, optional={"id": scalars, "response": texts | scalars}
)
instructions = st.fixed_dictionaries(
    {"prompt": texts, "instruction_id_list": st.lists(texts | scalars, max_size=2)},
    optional={"kwargs": st.lists(fuzzing.values, max_size=2) | fuzzing.values, "key": scalars},
)
choice_rows = st.fixed_dictionaries(
    {"question": texts, "choices": st.lists(texts | scalars, max_size=4) | fuzzing.values},
    optional={
        "answer": scalars,
        "error_type": st.sampled_from(("ok", "wrong_groundtruth", "expert")) | scalars,
        "correct_answer": scalars,
        **dict.fromkeys(("Correct Answer", "Incorrect Answer 1", "Question"), scalars),
    },
)
task_rows = problem_rows | instructions | choice_rows
