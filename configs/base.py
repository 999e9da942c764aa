"""Every knob, once, with its unit or consequence. Recipes start from here and say what differs.

    python -m distill.train --config=configs/base.py --workdir=runs/x \
        --config.student.path=Qwen3-0.6B --config.teacher.path=Qwen3-1.7B \
        --config.opd.data.source=gsm8k.jsonl
"""

from ml_collections import ConfigDict


def stage(objective: str) -> ConfigDict:
    """One stage of training: an objective, what it reads, and its own optimiser."""
    c = ConfigDict()
    c.objective = objective  # sft: cross-entropy on traces; opd: reverse KL on own samples
    c.steps = 100
    c.batch_size = 64  # sequences a step; for opd prompts x samples
    c.samples = 1  # opd: responses to each prompt
    c.accumulate = 1  # micro-batches a step; memory falls with it, the gradient stays the same
    c.max_prompt_tokens = 512  # a longer prompt is refused
    c.max_response_tokens = 1024  # sft: traces are cut here; opd: sampling stops here

    # Data: a file of rows (jsonl), or the generated task.
    c.data = ConfigDict()
    c.data.source = "arithmetic"  # or PATH.jsonl with prompt, messages, question or tokens
    c.data.size = 0  # first rows (problems) used, in a new order each epoch; 0: all there are
    c.data.thinking = True  # the chat template's switch
    c.data.operations = (3, 5)  # arithmetic: fewest and most operations of a problem
    c.data.split = "train"  # arithmetic: train or test; they share no problem

    # Sampling, for opd. Anything but the plain distribution changes what is being learned.
    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0
    c.sampling.top_k = 0  # 0: off
    c.sampling.top_p = 1.0  # 1: off

    # AdamW.
    c.optim = ConfigDict()
    c.optim.learning_rate = 1e-5
    c.optim.schedule = "cosine"  # constant, linear or cosine, after the warm-up
    c.optim.warmup_steps = 10
    c.optim.final_fraction = 0.1  # of the learning rate, at the last step
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0  # not on norms
    c.optim.clip_norm = 1.0  # of the whole gradient; 0: off
    return c


def get_config(arg: str = "") -> ConfigDict:
    """The base recipe: on-policy distillation from a teacher's distribution."""
    if arg:
        raise ValueError(f"configs/base.py takes no argument, got {arg!r}")
    c = ConfigDict()
    c.seed = 0  # of data order, sampling and random initialisation
    c.stages = ("opd",)  # names of the sub-configs below, in the order they run

    # Models: directories in Hugging Face format.
    c.student = ConfigDict()
    c.student.path = ""
    c.student.random_init = False  # take config and tokenizer from path, weights at random
    c.student.dtype = "bfloat16"  # of activations; trained parameters are always float32
    c.student.remat = True  # recompute each layer in the backward pass: less memory, 4/3 the time
    c.student.balance_loss = 0.0  # weight of the load-balancing loss of experts; 0.001 is usual
    c.teacher = ConfigDict()
    c.teacher.path = ""  # needed where a stage is opd
    # int8 or float8_e4m3fn: the layers' kernels in 8 bits, a scale for each output channel;
    # half the memory of bfloat16. LOG.md has what it costs in KL.
    c.teacher.param_dtype = "bfloat16"
    c.teacher.dtype = "bfloat16"

    # Devices along each axis of the mesh; -1: all that are left.
    c.mesh = ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 1
    c.mesh.expert = 1  # divides the number of experts; for all other weights it is like data

    c.logits_mib = 128.0  # MiB of float32 logits that one chunk of the loss holds on a device

    # Files of the run.
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.log = ConfigDict()
    c.log.transcripts_every = 50  # steps between files of sampled transcripts
    c.log.transcripts = 8  # rows in each

    c.sft = stage("sft")
    c.opd = stage("opd")
    return c
