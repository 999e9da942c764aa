"""Two real processes read disjoint shares of each step that make the batch of one process."""

import json
import subprocess
import sys

from tests.support.paths import ROOT
from tests.support.processes import find_free_port

PROCESS = """
import json, sys, types
import jax
jax.config.update("jax_num_cpu_devices", 2)
number, count, port = map(int, sys.argv[1:4])
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, number)
import numpy as np
from configs import base
from distill.data import chat, dataset
from distill.objectives import losses
from distill.runtime import mesh as mesh_lib
from distill.training import collect, loop, setup
from jax.experimental import multihost_utils

c = base.get_config()
s = base.make_stage("sft")
s.batch_size, s.max_prompt_tokens, s.max_response_tokens = 4, 48, 16  # 12 rows: one epoch
s.data.source = "assets/rows/gsm8k.jsonl"
read = []
source = dataset.load_source(s.data, chat.load_tokenizer("assets/teacher"), 0, True)
read_example = source.read_example
record = lambda i: (read.append(i), read_example(i))[1]
source = dataset.Source(source.size, record)
stage = setup.StageSetup("sft", s, 0, source, None, losses.OBJECTIVES["sft"], 0)
mesh = mesh_lib.make_mesh(1, -1, 1)
who = types.SimpleNamespace(replay_routing=False)
collector = collect.make_collector(c, who, stage, mesh, None)
steps = []
for step in range(3):
    (((micro,),), _) = loop.collect_step(collector, {}, step)
    whole = multihost_utils.process_allgather(micro.to_device(mesh).tokens_BT, tiled=True)
    steps.append(np.asarray(whole).tolist())
each = 4 // count  # steps are read in order, the next one prefetched
print(json.dumps([(read[i * each : (i + 1) * each], step) for i, step in enumerate(steps)]))
"""


def run(count: int) -> list[list]:
    port = find_free_port()
    words = [sys.executable, "-W", "ignore", "-c", PROCESS]
    started = [
        subprocess.Popen([*words, str(i), str(count), str(port)], stdout=-1, text=True, cwd=ROOT)
        for i in range(count)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    return [json.loads(text.splitlines()[-1]) for text in outputs]


def test_two_processes_read_one_batch() -> None:
    (alone,), (first, second) = run(1), run(2)
    for step, of_first, of_second in zip(alone, first, second, strict=True):
        (rows, batch), (first_rows, first_batch), (second_rows, second_batch) = (
            step,
            of_first,
            of_second,
        )
        assert first_batch == second_batch == batch
        assert not set(first_rows) & set(second_rows) and len(first_rows) == 2
        assert first_rows + second_rows == rows
