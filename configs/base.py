"""Every knob, once, with its unit or consequence. Recipes start from here and say what differs.

    python -m distill.train --config=configs/base.py --workdir=runs/x \
        --config.student.path=Qwen3-0.6B --config.teacher.path=Qwen3-1.7B \
        --config.opd.data.source=gsm8k.jsonl
"""

from ml_collections import ConfigDict, config_dict

# Fields of losses.Loss and their types.
LOSS = {
    **dict.fromkeys(("sft", "teacher", "reward", "reference", "beta", "skew"), float),
    **dict.fromkeys(("temperature", "discount", "clip_low", "clip_high", "truncate"), float),
    **dict.fromkeys(("divergence", "estimator", "k_of", "served", "k1_of"), str),
    **dict.fromkeys(("group", "ratio", "clip", "aggregation"), str),
    **dict.fromkeys(("k", "served_k"), int),
    "baseline": bool,
}


def data() -> ConfigDict:
    """Rows of a file or a set, or the generated task."""
    c = ConfigDict()
    # PATH.jsonl, .json or .parquet; hf:NAME[:CONFIG][:SPLIT]; tfds:NAME[:CONFIG][:SPLIT]; or
    # arithmetic. Rows have prompt, messages, question or tokens, or the columns of a known set.
    c.source = "arithmetic"
    c.mixture = ()  # in its place, pairs of a source and a weight: (("a.jsonl", 3.0), ...)
    c.columns = ""  # "": by those found; or a name in distill/columns.py; or ours=theirs,...
    c.size = 0  # first rows (problems) used, in a new order each epoch; 0: all there are
    c.check = 10_000  # rows of each source read before step 0; later ones as they are needed
    c.on_bad_row = "fail"  # or skip: leave it out, say so, count it (metric data/skipped)
    c.streaming = False  # hf: fetch while training, instead of to disk before
    c.window = 4096  # rows of a stream shuffled among themselves; they are held in memory
    c.turns = "last"  # sft on chats: the last answer; all: each, earlier reasoning dropped
    c.keep = "finished"  # of generated samples: finished by a stop token, correct, or all
    c.thinking = True  # the chat template's switch
    c.operations = (3, 5)  # arithmetic: fewest and most operations of a problem
    c.split = "train"  # arithmetic: train or test; they share no problem
    return c


def reward() -> ConfigDict:
    """For objectives that have one: a weighted sum of terms in [0, 1] or [-1, 0]."""
    c = ConfigDict()
    c.grader = "arithmetic"  # a benchmark's, which compares with the rows' answers
    c.correct = 1.0
    c.format = 0.0  # one closed think block, then an answer
    c.length = 0.0  # a penalty on the last `margin` tokens before max_response_tokens
    c.margin = 0
    c.repetition = 0.0  # a penalty on runs of 8 tokens said before
    c.judge = 0.0  # mean log-probability that the teacher gives the response
    # Groups whose rewards are all equal teach nothing. keep: they count as zero; drop: they do not
    # count; replace: other prompts are asked, up to `rounds` times, and what is left is dropped.
    c.constant_groups = "keep"
    c.rounds = 3
    return c


def optim() -> ConfigDict:
    """The optimiser of a stage."""
    c = ConfigDict()
    c.name = "adamw"  # or muon, adafactor, sgd (distill/optim.py)
    c.learning_rate = 1e-5
    c.schedule = "cosine"  # constant, linear or cosine, after the warm-up
    c.warmup_steps = 10
    c.final_fraction = 0.1  # of the learning rate, at the last step
    c.b1 = 0.9  # of the first moment, or the momentum
    c.b2 = 0.95
    c.eps = 1e-8
    c.momentum_dtype = "float32"  # bfloat16: half of the first moment's memory
    c.weight_decay = 0.0  # not on norms
    c.clip_norm = 1.0  # of the whole gradient; 0: off
    return c


def stage(objective: str) -> ConfigDict:
    """One stage of training: an objective, what it reads, and its own optimiser."""
    c = ConfigDict()
    # What is minimised, a row of losses.TABLE. On traces: sft (cross-entropy), distill (forward KL
    # from the teacher); half and half: gkd; on own samples: opd (reverse KL), opd_sampled, grpo,
    # dr_grpo, dapo, gspo, cispo, rloo, hybrid (reward and teacher at once).
    c.objective = objective
    c.on_policy = config_dict.placeholder(float)  # share of rows that the student writes itself
    c.loss = ConfigDict()  # any field of losses.Loss, in place of the objective's own
    for field, kind in LOSS.items():
        c.loss[field] = config_dict.placeholder(kind)
    c.steps = 100
    c.batch_size = 64  # sequences a step; for opd prompts x samples
    c.samples = 1  # opd: responses to each prompt
    c.accumulate = 1  # micro-batches a step; memory falls with it, the gradient stays the same
    c.minibatches = 1  # updates that share a step's rows; schedules count updates
    c.epochs = 1  # how often a step's rows are trained on; above 1 the ratio corrects for it
    c.max_prompt_tokens = 512  # a longer prompt is refused
    c.max_response_tokens = 1024  # sft: traces are cut here; opd: sampling stops here

    c.pack_tokens = 0  # sft: rows of so many tokens, as many examples in each as fit; 0: one each

    c.data = data()
    c.reward = reward()
    # Sampling, for opd. Anything but the plain distribution changes what is being learned.
    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0
    c.sampling.top_k = 0  # 0: off
    c.sampling.top_p = 1.0  # 1: off
    c.sampling.min_p = 0.0  # 0: off
    c.sampling.presence_penalty = 0.0  # off a logit once its token is in the response; 0: off

    # How the device samples; what is sampled does not depend on it.
    c.rollout = ConfigDict()
    c.rollout.slots = 0  # rows that decode at once; below batch_size, ended ones make room; 0: all
    c.rollout.segment = 64  # tokens a row between two looks of the host at which rows have ended
    c.rollout.chunk = 2048  # tokens of prompts read in one call; bounds its memory
    c.rollout.cache_tokens = 0  # most slots x tokens of the cache; 0: slots x longest row
    c.rollout.cache_dtype = ""  # bfloat16 or int8: less memory, less exact; "": student.dtype
    c.rollout.budget = (
        0  # tokens sampled a step; rows that have not ended go on in the next; 0: off
    )
    # Sample the rows of step i + 1 while step i is scored and trained, from the weights of before
    # its update. Losses of drawn tokens correct for that by their ratio, and are refused without
    # one; exact and topk are right at every token, but the responses that they go along are one
    # update old. The weights that sample, in student.dtype, are then held through the update.
    c.rollout.ahead = False
    c.rollout.gathered = True  # each row shard holds all weights; False: fetches them each token

    c.optim = optim()
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
    # "": its own tokenizer; or a model whose tokenizer and template it takes, which have its own
    # tokens under the same ids. A Base student of a post-trained teacher: the teacher.
    c.student.tokenizer = ""
    c.student.random_init = False  # take config and tokenizer from path, weights at random
    c.student.dtype = "bfloat16"  # of activations; trained parameters are always float32
    c.student.param_dtype = "bfloat16"  # of a base that LoRA leaves frozen
    c.student.remat = True  # recompute each layer in the backward pass: less memory, 4/3 the time
    c.student.balance_loss = 0.0  # weight of the load-balancing loss of experts; 0.001 is usual
    c.student.lora = ConfigDict()  # or path names a PEFT adapter of these: it is trained on
    c.student.lora.rank = 0  # 0: all parameters are trained; else a low-rank term beside the base
    c.student.lora.alpha = 32.0  # the term counts alpha / rank
    c.student.lora.rslora = False  # it counts alpha / sqrt(rank)
    c.student.lora.targets = (  # projections; the last three mean those of experts too
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
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

    c.attention = "auto"  # splash on TPU, cudnn on GPU, else xla; all compute the same
    c.logits_mib = 128.0  # MiB of float32 logits that one chunk of the loss holds on a device

    # Files of the run.
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.log = ConfigDict()
    c.log.transcripts_every = 50  # steps between files of sampled transcripts
    c.log.transcripts = 8  # rows in each
    c.log.overlap = 0  # tokens of the teacher's top that the student's is compared with; slow

    # Evaluation while it trains: every so many steps and after each stage.
    c.eval = ConfigDict()
    c.eval.every = 0  # steps; 0: never
    c.eval.benchmark = "arithmetic"
    c.eval.data = ""  # PATH.jsonl or hf:NAME:CONFIG:SPLIT; arithmetic makes its own
    c.eval.limit = 200  # first problems; 0: all
    c.eval.protocol = "greedy"  # how to sample, of distill/benchmarks.py
    c.eval.samples = 0  # responses to each problem; 0: the protocol's
    c.eval.max_new_tokens = 0  # longest response; 0: the protocol's
    c.eval.batch_size = 64  # responses sampled together
    c.eval.best = "accuracy"  # figure whose best checkpoint is kept; "-NAME": least; "": none

    c.sft = stage("sft")
    c.opd = stage("opd")
    return c
