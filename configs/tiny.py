"""Shrinks a recipe: the same stages, objectives and kinds of data, two steps of each in seconds on
a CPU, with the models and rows under assets/ and no network."""

from ml_collections import ConfigDict

# Source of a recipe -> rows with the same columns that replace it.
SAMPLE_ROWS = {
    "hf:open-thoughts/OpenThoughts3-1.2M": "assets/rows/openthoughts3.jsonl",
    "hf:zwhe99/DeepMath-103K": "assets/rows/deepmath.jsonl",
    "hf:openai/gsm8k:main": "assets/rows/gsm8k.jsonl",
    "hf:microsoft/orca-math-word-problems-200k": "assets/rows/orca_math.jsonl",
    "hf:simplescaling/s1K-1.1": "assets/rows/s1k.jsonl",
    "hf:open-r1/OpenR1-Math-220k": "assets/rows/openr1_math.jsonl",
    "hf:allenai/tulu-3-sft-mixture": "assets/rows/tulu3.jsonl",
    "traces_think.jsonl": "assets/rows/traces_think.jsonl",
    "traces_no_think.jsonl": "assets/rows/traces_no_think.jsonl",
    "documents.jsonl": "assets/rows/documents.jsonl",
    "chats.jsonl": "assets/rows/chats.jsonl",
    "questions.jsonl": "assets/rows/questions.jsonl",
    "hf:google/IFEval": "assets/rows/ifeval.jsonl",
    "manual.md": "assets/rows/manual.md",
    "manual_questions.jsonl": "assets/rows/manual_questions.jsonl",
}
BATCH, PROMPT, RESPONSE = 8, 48, 16


def shrink_config(c: ConfigDict) -> ConfigDict:
    """Shrinks `c` in place and returns it."""
    c.student.path, c.student.tokenizer = "assets/student", ""
    c.student.dtype = c.student.param_dtype = "float32"
    c.student.remat = False
    c.student.router_aux_loss_coef = 0.0  # it has no experts
    c.student.lora.rank = min(c.student.lora.rank, 4)  # so that recipes share compiled programs
    c.teacher.dtype = "float32"
    if c.teacher.param_dtype == "bfloat16":
        c.teacher.param_dtype = "float32"
    if c.teacher.path not in ("", "initial"):
        c.teacher.path = "assets/teacher"
    c.mesh.data = c.mesh.fsdp = c.mesh.tensor = c.mesh.context = c.mesh.expert = 1
    c.eval.every = 0
    for name in c.stages:
        s = c[name]
        s.steps, s.batch_size, s.samples = 2, BATCH, min(s.samples, BATCH)
        s.accumulate = s.minibatches = 1
        s.max_prompt_tokens, s.max_response_tokens = PROMPT, RESPONSE
        s.pack_tokens = 2 * (PROMPT + RESPONSE) if s.pack_tokens else 0
        s.rollout.slots = 0
        s.optim.learning_rate = 1e-3  # the same rate, for the same reason
        s.data.source = SAMPLE_ROWS.get(s.data.source, s.data.source)
        s.data.mixture = tuple((SAMPLE_ROWS[source], weight) for source, weight in s.data.mixture)
        s.data.max_rows = min(s.data.max_rows, BATCH)
        s.data.template = "{question}"
        if s.context.text:
            s.context.text, s.context.max_tokens = SAMPLE_ROWS[s.context.text], PROMPT
    return c
