"""Every knob, once, with its unit or consequence. Recipes start from here and say what differs.

    python -m distill.train --config=configs/base.py --workdir=runs/x \
        --config.student.path=Qwen3-0.6B --config.teacher.path=Qwen3-1.7B \
        --config.opd.data.source=gsm8k.jsonl
"""

from ml_collections import ConfigDict, config_dict

# How the mathematical benchmarks put a question (Qwen3's model card); for data.template.
BOXED_TEMPLATE = (
    "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)

# Fields of losses.Loss and their types.
LOSS_FIELDS = {
    **dict.fromkeys(("sft", "teacher", "reward", "reference", "beta", "skew"), float),
    **dict.fromkeys(("temperature", "discount", "clip_low", "clip_high", "tis_clip"), float),
    **dict.fromkeys(("divergence", "estimator", "topk_from", "teacher_output", "k1_from"), str),
    **dict.fromkeys(("advantage_norm", "ratio", "clip", "aggregation"), str),
    **dict.fromkeys(("k", "teacher_topk"), int),
    "baseline": bool,
}


def make_data() -> ConfigDict:
    """Rows of a file or a set, or the generated task."""
    c = ConfigDict()
    # PATH.jsonl, .json or .parquet; hf:NAME[:CONFIG][:SPLIT]; tfds:NAME[:CONFIG][:SPLIT]; or
    # arithmetic. Rows have prompt, messages, question or tokens, or the columns of a known set.
    c.source = "arithmetic"
    c.mixture = ()  # in its place, pairs of a source and a weight: (("a.jsonl", 3.0), ...)
    c.template = "{question}"  # how a row's question is put; BOXED as the benchmarks do
    c.columns = ""  # "": by those found; or a name in distill/data/columns.py; or ours=theirs,...
    c.max_rows = 0  # first rows (problems) used, in a new order each epoch; 0: all there are
    c.check_rows = 10_000  # rows of each source read before step 0; later ones as they are needed
    c.on_bad_row = "fail"  # or skip: leave it out, say so, count it (metric data/skipped)
    c.streaming = False  # hf: fetch while training, instead of to disk before
    c.shuffle_window = 4096  # rows of a stream shuffled among themselves; they are held in memory
    c.turns = "last"  # sft on chats: the last answer; all: each, earlier reasoning dropped
    c.keep_samples = "finished"  # of generated samples: finished by a stop token, correct, or all
    # The chat template's switch: the share of prompts in thinking mode. 1: all; 0: none, their
    # prompts end with an empty think block, which is not trained. Between, traces keep the mode
    # that they show; and always a row that says its own (thinking: false, or /no_think) keeps it.
    c.thinking = 1.0
    # A column of numbers, more is harder; or PATH.jsonl of verify --keep=all or evaluate: 1 - the
    # share of a prompt's samples that were correct. The metric data/difficulty is its mean.
    c.difficulty = ""
    # By difficulty, in place of a new order each epoch: ordered (from the easiest to the hardest
    # over the stage), widening (of the easiest share, which grows to all), weighted (each prompt
    # as often as p(1 - p) says, of a difficulty in [0, 1]).
    c.curriculum = ""
    c.operations = (3, 5)  # arithmetic: fewest and most operations of a problem
    c.split = "train"  # arithmetic: train or test; they share no problem
    return c


def make_teacher() -> ConfigDict:
    """A model that says how likely it finds what was written. A recipe may add some under names of
    its own, `c.original = base.teacher()`, for its stages to name in `teachers`."""
    c = ConfigDict()
    # A model directory, a hub id, an adapter or a run; or of the student's own past: initial, its
    # weights before step 0 (with LoRA the frozen base, at no further memory and in its dtypes), or
    # ema, the moving average of its weights (student.ema_decay).
    c.path = ""
    c.step = 0  # of a run: the checkpoint after so many steps; 0: the newest
    # int8 or float8_e4m3fn: the layers' kernels in 8 bits, a scale for each output channel;
    # half the memory of bfloat16. LOG.md has what it costs in KL.
    c.param_dtype = "bfloat16"
    c.dtype = "bfloat16"  # of activations
    return c


def make_reward() -> ConfigDict:
    """For objectives that have one: a weighted sum of terms in [0, 1] or [-1, 0]."""
    c = ConfigDict()
    c.grader = "arithmetic"  # a benchmark's, which compares with the rows' answers
    c.correct = 1.0
    c.format = 0.0  # one closed think block, then an answer
    c.length = 0.0  # a penalty on the last `length_margin` tokens before max_response_tokens
    c.length_margin = 0
    c.repetition = 0.0  # a penalty on runs of 8 tokens said before
    c.teacher_logprob = 0.0  # mean log-probability that the teacher gives the response
    # Groups whose rewards are all equal teach nothing. keep: they count as zero; drop: they do not
    # count; replace: other prompts are asked, up to `max_rounds` times, then the rest are dropped.
    c.zero_variance_groups = "keep"
    c.max_rounds = 3
    return c


def make_optim() -> ConfigDict:
    """The optimiser of a stage."""
    c = ConfigDict()
    c.name = "adamw"  # or muon, adafactor, sgd (distill/training/optim.py)
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


def make_rollout() -> ConfigDict:
    """How the device samples; what is sampled does not depend on it."""
    c = ConfigDict()
    # Rows that decode at once; ended ones make room for those waiting. 0: as many as the cache
    # allows, which is three times the longest rows that it holds, and no more than there are.
    c.slots = 0
    # Tokens a row between two looks of the host at which rows have ended; on CPUs 32 at most.
    c.segment = 64
    c.prefill_chunk = (
        512  # tokens of prompts that each part of the rows reads in one call; on CPUs 128
    )
    # Tokens that the cache holds on all devices; below 1: the share of the memory that is left by
    # what the run keeps and the weights that decode. 0: 0.8; on CPUs as many as rows may have. When
    # it is full, the youngest rows wait, and read again what they have.
    c.cache_tokens = 0.0
    c.page_size = 0  # tokens of a page of the cache; 0: 128
    # bfloat16, float8_e4m3fn (TPU) or int8 (GPU, CPU): less memory, less exact; "": student.dtype
    c.cache_dtype = ""
    # Of the copy of the weights that decodes; "": student.dtype. bfloat16, or in 8 bits int8 or
    # float8_e4m3fn, made on the device each step: faster, but the sampler is then another policy
    # than the trainer (metric train/sampler_delta), which importance ratios correct for.
    c.param_dtype = ""
    c.token_budget = 0  # tokens sampled a step; rows that have not ended go on in the next; 0: off
    # Sample the rows of step i + 1 while step i is scored and trained, from the weights of before
    # its update. Losses of drawn tokens correct for that by their ratio, and are refused without
    # one; exact and topk are right at every token, but the responses that they go along are one
    # update old. The weights that sample, in student.dtype, are then held through the update.
    c.asynchronous = False
    c.gather_weights = True  # each row shard holds all weights; False: fetches them each token
    return c


def make_stage(objective: str) -> ConfigDict:
    """One stage of training: an objective, what it reads, and its own optimiser."""
    c = ConfigDict()
    # What is minimised, a row of losses.TABLE. On traces: sft (cross-entropy), distill (forward KL
    # from the teacher); half and half: gkd; on own samples: opd (reverse KL), opd_sampled, grpo,
    # dr_grpo, dapo, gspo, cispo, rloo, hybrid (reward and teacher at once).
    c.objective = objective
    c.on_policy_share = config_dict.placeholder(
        float
    )  # share of rows that the student writes itself
    c.loss = ConfigDict()  # any field of losses.Loss, in place of the objective's own
    for field, kind in LOSS_FIELDS.items():
        c.loss[field] = config_dict.placeholder(kind)
    c.steps = 100
    c.batch_size = 64  # sequences a step; for opd prompts x samples
    c.samples = 1  # opd: responses to each prompt
    # Micro-batches of an update, each read by the teachers and trained before the next; memory
    # falls with it, the gradient stays the same. Sampled rows are packed (whole prompts and
    # responses, one behind the other) into micro-batches of at most so many rows, and fewer where
    # these keep the devices busy: then it is the least number for a step of the longest responses.
    c.accumulate = 1
    c.minibatches = 1  # updates that share a step's rows; schedules count updates
    c.epochs = 1  # how often a step's rows are trained on; above 1 the ratio corrects for it
    c.max_prompt_tokens = 512  # a longer prompt is refused
    c.max_response_tokens = 1024  # sft: traces are cut here; opd: sampling stops here

    # Traces: rows of so many tokens, as many examples in each as fit; 0: one each. Samples, which
    # are always packed: rows of so many; 0: max_prompt_tokens + max_response_tokens.
    c.pack_tokens = 0

    c.data = make_data()
    # Who teaches, by the names of their sub-configs. Of several without weights, the i-th teaches
    # the rows of the i-th source of data.mixture; with weights, each token's teacher is the mixture
    # of their distributions by these shares. A judge is theirs in the same way. Each reads the
    # whole batch, so scoring costs their sum.
    c.teachers = ("teacher",)
    c.teacher_weights = ()
    # What the teachers read and the student does not: a manual, a solution, a better instruction.
    # The chat template renders it into their prompt alone; where both are given, text comes first.
    c.context = ConfigDict()
    c.context.text = ""  # PATH of a text file, the same for every row
    c.context.column = ""  # of the rows: a text; beside a prompt of tokens, ids
    c.context.place = "system"  # in the system turn; or question: before the last user's words
    c.context.max_tokens = 1024  # it may add to a prompt; a longer one is refused
    c.reward = make_reward()
    # Sampling, for opd. Anything but the plain distribution changes what is being learned. Losses
    # of drawn tokens (rewards, opd_sampled, k2, k3) read all models at the temperature of the draw.
    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0
    c.sampling.top_k = 0  # 0: off
    c.sampling.top_p = 1.0  # 1: off
    c.sampling.min_p = 0.0  # 0: off
    c.sampling.presence_penalty = 0.0  # off a logit once its token is in the response; 0: off

    c.rollout = make_rollout()
    c.optim = make_optim()
    return c


def make_evaluation() -> ConfigDict:
    """Evaluation while it trains: every so many steps and after each stage."""
    c = ConfigDict()
    c.every = 0  # steps; 0: never
    c.benchmark = "arithmetic"
    c.data = ""  # PATH.jsonl or hf:NAME:CONFIG:SPLIT; arithmetic makes its own
    c.limit = 200  # first problems; 0: all
    c.protocol = "greedy"  # how to sample, of distill/evaluation/tasks.py
    c.samples = 0  # responses to each problem; 0: the protocol's
    c.max_new_tokens = 0  # longest response; 0: the protocol's
    c.batch_size = 64  # responses sampled together
    c.best = "accuracy"  # figure whose best checkpoint is kept; "-NAME": least; "": none
    return c


def make_mesh() -> ConfigDict:
    """Devices along each axis of the mesh; -1: all that are left.

    On TPU an axis is best one of the torus (8 of v5e's 8x8): over two of them, gradients are added
    up whole on every device.
    """
    c = ConfigDict()
    c.data = 1  # rows alone, weights whole; of several slices a multiple of their number
    c.fsdp = -1  # rows and weights; these are fetched layer by layer
    # Heads and feed-forward, and of long rows the tokens between them: what a device keeps of each
    # layer is the same, and decoding holds 1/tensor of the weights. Divides the key-value heads.
    c.tensor = 1
    # Tokens of long rows; for weights it is like fsdp, for rows that are sampled too. In attention
    # their heads instead, so tensor*context divides the query heads.
    c.context = 1
    c.expert = 1  # divides the number of experts; for all other weights it is like data
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
    # Of activations; trained parameters are always float32. float32 is multiplied as such on every
    # device: no TF32 on GPUs, no passes of bfloat16 on TPUs (policy.use).
    c.student.dtype = "bfloat16"
    # Of what is frozen of it: LoRA's base, or the copy that a loss with a reference compares with.
    # bfloat16, float32, or 8 bits as for the teacher.
    c.student.param_dtype = "bfloat16"
    c.student.remat = True  # recompute each layer in the backward pass: less memory, 4/3 the time
    # Decay of a moving average of the trained parameters (LoRA: of its factors) after each update,
    # which all stages share: a teacher's path, and `export --average`. 0: none is kept.
    c.student.ema_decay = 0.0
    c.student.router_aux_loss_coef = (
        0.0  # weight of the load-balancing loss of experts; 0.001 is usual
    )
    # The update sends each token to the experts that the sampler sent it to (R3, arXiv 2510.11370):
    # rounding then flips no choice between the two. 2·A bytes a token and layer on the host.
    c.student.replay_routing = False
    c.student.lora = ConfigDict()  # or path names a PEFT adapter of these: it is trained on
    c.student.lora.rank = 0  # 0: all parameters are trained; else a low-rank term beside the base
    c.student.lora.alpha = 32.0  # the term counts alpha / rank
    c.student.lora.rslora = False  # it counts alpha / sqrt(rank)
    c.student.lora.targets = (  # projections; the last three mean those of experts too
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    c.teacher = make_teacher()  # needed where a stage has one

    c.mesh = make_mesh()
    # Teachers and references on devices of their own, the last so many of each process, split by
    # axes of their own: neither then takes room beside the other. Hidden states travel, and each
    # output head once. 0: the same devices.
    c.teacher_mesh = make_mesh()
    c.teacher_mesh.devices = 0

    c.attention = "auto"  # splash on TPU, cudnn on GPU, else xla; all compute the same
    # On a GPU: a run that is killed and resumed, or run again, has the same bits, as on a CPU or a
    # TPU without it. Slower there: no atomic additions, no autotuned kernels.
    c.deterministic = False
    # MiB of float32 logits that one chunk of the loss holds on a device; several times as much is
    # then in memory. 0: 128, on GPUs 1024. Each chunk reads the heads, and adds to a gradient as
    # large as one: smaller chunks wait for memory.
    c.loss_chunk_mib = 0.0

    # A directory that keeps compiled programs, so that a run starts faster the next time; gs://… of
    # a pod's hosts. It holds code: share it with nobody. "": JAX_COMPILATION_CACHE_DIR, or none.
    c.compilation_cache = ""

    # Files of the run.
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.log = ConfigDict()
    c.log.transcripts_every = 50  # steps between files of sampled transcripts
    c.log.transcripts = 8  # rows in each
    c.log.overlap_top_k = 0  # tokens of the teacher's top that the student's is compared with; slow

    c.eval = make_evaluation()
    c.sft = make_stage("sft")
    c.opd = make_stage("opd")
    return c
