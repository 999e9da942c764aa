"""python -m distill.harness --model=DIR --tasks=NAME,NAME --out=FILE.json: runs lm-eval's tasks.

The model runs in this process, without a server. Needs optional packages:
`pip install -r requirements-eval.txt`.
"""

import importlib.util
from pathlib import Path

from absl import flags

from distill.runtime import cli, console, network, paths
from models.errors import UserError

KEPT = ("results", "groups", "configs", "versions", "n-shot", "n-samples", "higher_is_better")

OPTIONS = flags.FlagValues()
MODEL, DTYPE = cli.define_model_flags(OPTIONS)
TASKS = flags.DEFINE_list("tasks", None, "Names of lm-eval's tasks.", OPTIONS, required=True)
OUT = flags.DEFINE_string("out", None, "JSON file to write.", OPTIONS, required=True)
INCLUDE = flags.DEFINE_string("include", "", "Folder of further tasks (yaml).", OPTIONS)
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples in the prompt; default: the task's.", flag_values=OPTIONS
)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Only this many rows of each task; 0: all.", lower_bound=0, flag_values=OPTIONS
)
CHAT_MODE = flags.DEFINE_enum(
    "chat", "off", ["off", "thinking", "nonthinking"], "Use the chat template.", flag_values=OPTIONS
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Rows computed together.", lower_bound=1, flag_values=OPTIONS
)


def main() -> None:
    if not importlib.util.find_spec("lm_eval"):
        raise UserError("lm-eval is not installed: pip install -r requirements-eval.txt")
    network.find_hub()
    from distill.evaluation import lm_eval_model
    from distill.policy import policy
    from distill.runtime import outputs, run_files

    out = paths.check_output(OUT.value)
    subject = policy.make_abstract_for_inference(MODEL.value, DTYPE.value)
    if INCLUDE.value and not Path(INCLUDE.value).is_dir():
        raise UserError(f"--include={INCLUDE.value}: not a folder")
    with outputs.own_output(out, "harness", OPTIONS):
        with policy.use(subject):
            subject = policy.load(subject)
        results = lm_eval_model.run_tasks(
            subject,
            TASKS.value,
            batch_size=BATCH_SIZE.value,
            chat_mode=CHAT_MODE.value,
            include_path=INCLUDE.value or None,
            num_fewshot=NUM_FEWSHOT.value,
            limit=LIMIT.value or None,
        )
        run_files.write_json(out, {name: results[name] for name in KEPT if name in results})
    for task, task_metrics in results["results"].items():
        for name, value in task_metrics.items():
            if isinstance(value, float):
                print(f"{task:24} {name:32} {value:.4f}")
    console.print_end([f"wrote {OUT.value}"])


if __name__ == "__main__":
    cli.run(main, OPTIONS)
