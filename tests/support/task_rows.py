"""Strategies of rows in the published forms of benchmarks, right and wrong ones."""

import base64
import pickle
import zlib

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
packed = st.builds(
    lambda content: base64.b64encode(zlib.compress(pickle.dumps(content))).decode(),
    texts | fuzzing.values,
)
cases = st.sampled_from(('[{"input": "[1]", "output": "1"}]', "[]", '[{"input": 1}]')) | texts
program_rows = st.fixed_dictionaries(
    {
        **dict.fromkeys(("question_content", "prompt", "test"), texts),
        "public_test_cases": cases,
        "private_test_cases": cases | packed,
        "entry_point": texts | st.just("f"),
        "test_list": st.lists(texts | scalars, max_size=2) | st.just(["assert f(1)"]),
    },
    optional={"metadata": texts | st.sampled_from(('{"func_name": "f"}', "[]")), "code": texts},
)
task_rows = problem_rows | instructions | choice_rows | program_rows
