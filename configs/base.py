"""Every setting, once, with its unit or consequence. Recipes start from here and set what differs.

    python -m distill.train --config=configs/base.py --workdir=runs/x \
        --config.student.path=Qwen/Qwen3-0.6B --config.teacher.path=Qwen/Qwen3-1.7B \
        --config.opd.data.source=hf:openai/gsm8k:main

Any key is set in this way, also in a recipe: --config.opd.steps=200. A dot enters a part, and `opd`
is the name of a stage. Models are directories or ids on the Hugging Face hub, and data are files or
data sets there. With --check nothing is trained: it reads them, and lists what is wrong.
A part refuses keys that are not listed here; a recipe may add stages and teachers of its own.
"""

from ml_collections import ConfigDict, config_dict

# Mathematical questions as Qwen3's model card puts them; for data.template.
BOXED_TEMPLATE = (
    "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)

# Fields of losses.Loss and their types.
LOSS_FIELDS = {
    **dict.fromkeys(("sft", "teacher", "reward", "reference", "beta", "skew"), float),
    **dict.fromkeys(("temperature", "discount", "clip_low", "clip_high", "tis_clip"), float),
    **dict.fromkeys(("position_half_life", "entropy_weight"), float),
    **dict.fromkeys(("divergence", "estimator", "topk_from", "teacher_output", "k1_from"), str),
    **dict.fromkeys(("advantage_norm", "ratio", "clip", "aggregation", "entropy_from"), str),
    **dict.fromkeys(("k", "teacher_topk"), int),
    "baseline": bool,
}


def make_data() -> ConfigDict:
    """Training rows, from a file, a data set or the generated task."""
    c = ConfigDict()
    # PATH.jsonl, .json or .parquet; hf:NAME[:CONFIG][:SPLIT]; tfds:NAME[:CONFIG][:SPLIT]; or
    # arithmetic. Rows have prompt, messages, question or tokens, or the columns of a known set.
    c.source = "arithmetic"
    c.mixture = ()  # instead of source: pairs of source and weight, (("a.jsonl", 3.0), ...)
    c.template = "{question}"  # prompt of a question; BOXED_TEMPLATE as in the benchmarks
    c.columns = ""  # "": see distill/data/columns.py; or pairs: question=input,response=output
    c.max_rows = 0  # use only the first rows (problems), in a new order each epoch; 0: all
    c.check_rows = 10_000  # rows of each source read before step 0; later ones when needed
    c.on_bad_row = "fail"  # skip: leave rows out, print the first, count all (data/skipped)
    c.streaming = False  # hf: download while training, instead of before it
    c.shuffle_window = 4096  # rows of a stream held in memory and shuffled together
    c.turns = "last"  # sft on chats: train the last answer; all: each, earlier reasoning dropped
    c.keep_samples = "finished"  # of generated samples: finished (by a stop token), correct or all
    # Share of prompts in the chat template's thinking mode. 1: all; 0: none, and prompts end with
    # an empty think block, which is not trained. Between 0 and 1, traces keep the mode that they
    # show. A row's own mode (thinking: false, or /no_think) always wins. A trace with a think block
    # in a row that is not to think is refused. A template without the switch has one mode only.
    c.thinking = 1.0
    # A numeric column, more is harder; or PATH.jsonl from verify --keep=all or evaluate: 1 - the
    # share of a prompt's samples that were correct. The metric data/difficulty is its mean.
    c.difficulty = ""
    # Order by difficulty; "": a new random order each epoch. ordered: easiest to hardest over the
    # stage; widening: from the easiest share, which grows to all; weighted: each prompt as often as
    # p(1 - p), for difficulties p in [0, 1].
    c.curriculum = ""
    c.operations = (3, 5)  # arithmetic: fewest and most operations in a problem
    c.split = "train"  # arithmetic: train or test; they share no problem
    return c.lock()


def make_teacher() -> ConfigDict:
    """A model that scores responses. A recipe may add more under names of its own,
    `c.original = base.make_teacher()`, and list them in a stage's `teachers`."""
    c = ConfigDict()
    # A model directory, a hub id, an adapter or a run. Or a past student: initial, its weights
    # before step 0 (with LoRA the frozen base, in its dtypes, at no memory), or ema, the moving
    # average of its weights (student.ema_decay).
    # Or one that is not run here: http(s)://HOST:PORT of a server, or of several of the same model,
    # separated by commas; or a directory that `score` wrote.
    c.path = ""
    c.step = 0  # of a run: the checkpoint after this many steps; 0: the newest
    # Of a model that is run here (a server has dtypes of its own):
    # int8 or float8_e4m3fn: kernels of the layers in 8 bits, with a scale for each output channel;
    # half the memory of bfloat16. LOG.md has the cost in KL.
    c.param_dtype = "bfloat16"
    c.dtype = "bfloat16"  # of activations
    # Of servers:
    c.kind = "ours"  # python -m distill.serve; or vllm, sglang, which give no hidden states
    c.model = ""  # the served name; "": the only one that the server lists
    c.api_key_env = ""  # NAME of the environment variable with a bearer token; "": none is sent
    c.timeout_seconds = 0.0  # of one request; 0: 300
    c.max_in_flight = 0  # requests at a time, to each address; 0: 16
    return c.lock()


def make_reward() -> ConfigDict:
    """For objectives with rewards: weights of terms in [0, 1], or [-1, 0] for penalties."""
    c = ConfigDict()
    c.grader = "arithmetic"  # the benchmark whose grader compares answers with the rows'
    c.correct = 1.0
    # How much of an answer is right, where its grader can tell: the share of tests passed, or the
    # F1 of the words. By other graders the same as correct.
    c.score = 0.0
    c.format = 0.0  # one closed think block, then an answer
    c.length = 0.0  # penalty on the last `length_margin` tokens before max_response_tokens
    c.length_margin = 0  # tokens
    c.repetition = 0.0  # penalty on runs of 8 tokens that occurred before
    c.teacher_logprob = 0.0  # mean log-probability of the response under the teacher
    # Groups of equal rewards have no gradient. keep: they count as zero; drop: they do not count;
    # replace: sample other prompts, up to `max_rounds` times, then drop the rest.
    c.zero_variance_groups = "keep"
    c.max_rounds = 3
    return c.lock()


def make_optim() -> ConfigDict:
    """The optimiser of a stage."""
    c = ConfigDict()
    c.name = "adamw"  # or muon, adafactor, sgd (distill/training/optim.py)
    c.learning_rate = 1e-5
    c.schedule = "cosine"  # constant, linear or cosine, after the warm-up
    c.warmup_steps = 10
    c.final_fraction = 0.1  # of the learning rate, at the last step
    c.b1 = 0.9  # decay of the first moment, or momentum
    c.b2 = 0.95  # decay of the second moment
    c.eps = 1e-8
    c.momentum_dtype = "float32"  # bfloat16: half of the first moment's memory
    c.weight_decay = 0.0  # does not apply to norms
    c.clip_norm = 1.0  # of the whole gradient; 0: off
    return c.lock()


def make_rollout() -> ConfigDict:
    """Sets how the device samples. Only the dtypes change what is sampled."""
    c = ConfigDict()
    # Rows that decode together; waiting ones take the place of ended ones. 0: as many as the cache
    # allows, three times the longest rows that it holds, and no more than there are.
    c.slots = 0
    # Tokens of each row between two turns of the host, which finds ended rows; on CPUs at most 32.
    c.segment = 64
    # Prompt tokens that each row shard reads in one call; on CPUs at most 128.
    c.prefill_chunk = 512
    # Tokens that the cache holds on all devices. Below 1: a share of the memory that the run and
    # the decoding weights leave. 0: a share of 0.8; on CPUs as many as rows may have. When it is
    # full, the youngest rows wait, and their tokens are read again later.
    c.cache_tokens = 0.0
    c.page_size = 0  # tokens of a page of the cache; 0: 128
    # bfloat16, float8_e4m3fn (TPU) or int8 (GPU, CPU): less memory, less exact; "": student.dtype
    c.cache_dtype = ""
    # Of the copy of the weights that decodes; "": student.dtype. bfloat16, or in 8 bits int8 or
    # float8_e4m3fn, made on the device each step: faster, but the sampler is then another policy
    # than the trainer (metric train/sampler_delta), which importance ratios correct for.
    c.param_dtype = ""
    c.token_budget = 0  # tokens sampled each step; unfinished rows go on in the next; 0: no limit
    # Sample the rows of step i + 1 while step i is scored and trained, from the weights before its
    # update. Losses of drawn tokens need a ratio to correct for that; exact and topk are right at
    # every token, but of responses one update old. Holds the sampling weights, in student.dtype,
    # through the update.
    c.asynchronous = False
    c.gather_weights = True  # each row shard holds all weights; False: fetches them for each token
    # ngram: each step guesses a row's next tokens from what followed its last ones before, in it or
    # in responses to the same prompt, and keeps the guesses that sampling confirms: the same tokens
    # (as always, up to near ties in rounding) in fewer steps. "": off
    c.drafts = ""
    # The most tokens that a step guesses for a row, up to a page of the cache. It guesses as many,
    # half as many or none, whichever has paid.
    c.draft_tokens = 3
    return c.lock()


def make_stage(objective: str) -> ConfigDict:
    """A stage of training: an objective, its data, and its own optimiser."""
    c = ConfigDict()
    # A row of losses.OBJECTIVES. On traces: sft (cross-entropy), distill (KL from the teacher).
    # On a mixture: gkd. On own samples: opd (reverse KL), opd_sampled, grpo, dr_grpo, dapo, gspo,
    # cispo, rloo, hybrid (reward and teacher together).
    c.objective = objective
    # Share of rows that the student samples itself; None: the objective's. 0 with a loss of drawn
    # tokens (opd_sampled, k2, k3): stored samples, whose rows have logprobs as `generate` writes.
    c.on_policy_share = config_dict.placeholder(float)
    c.loss = ConfigDict()  # fields of losses.Loss; None: the objective's
    for field, kind in LOSS_FIELDS.items():
        c.loss[field] = config_dict.placeholder(kind)
    c.steps = 100
    c.batch_size = 64  # sequences of a step; of samples: prompts x samples
    c.samples = 1  # responses to each prompt
    # Micro-batches of an update, each scored and trained before the next: less memory, the same
    # gradient. Sampled rows are packed (whole prompts and responses, one after another) into
    # micro-batches of at most this many rows; where fewer rows keep the devices busy, into smaller
    # ones, and this is the least number for a step of the longest responses.
    c.accumulate = 1
    c.minibatches = 1  # updates that share the rows of a step; schedules count updates
    c.epochs = 1  # passes over the rows of a step; above 1 the ratio corrects for it
    c.max_prompt_tokens = 512  # longer prompts are refused
    c.max_response_tokens = 1024  # traces are cut here; sampling stops here
    # Shorter responses first, which cost less: pairs (step of the stage, most tokens of responses
    # that begin from it on), such as ((0, 64), (200, 256)); (): always max_response_tokens.
    # rollout/cut_by_schedule counts what it cuts; rollout/truncated does not.
    c.response_schedule = ()
    # Ends responses that have drifted from the teachers: each `every` tokens, student and teachers
    # read what is unfinished, and a response ends where the mean reverse KL of these tokens is
    # above `kl`. Metrics: rollout/drifted, the share that ended so; rollout/checked_kl and
    # rollout/checked_kl_p90, mean and 90th percentile of what is compared with `kl`. 1e9 ends none.
    c.drift = ConfigDict()
    c.drift.kl = 0.0  # nats a token, as train/reverse_kl; 0: no checks
    c.drift.every = 256  # response tokens
    # Tokens of a packed row. Traces: as many examples in each as fit; 0: one each. Samples, always
    # packed: 0: max_prompt_tokens + max_response_tokens.
    c.pack_tokens = 0

    c.data = make_data()
    # Names of the teachers' sub-configs. Several without weights: the i-th teaches the rows of the
    # i-th source of data.mixture. With weights: each token's teacher is the mixture of their
    # distributions by these shares. A judge is chosen the same way. Each teacher reads the whole
    # batch, so the cost of scoring is their sum.
    c.teachers = ("teacher",)
    c.teacher_weights = ()
    # Text that the teachers read and the student does not: a manual, a solution, a better
    # instruction. The chat template puts it into their prompt; with both sources, text comes first.
    c.context = ConfigDict()
    c.context.text = ""  # PATH of a text file, the same for every row
    c.context.column = ""  # of the rows: a text; for prompts of tokens, ids
    c.context.place = "system"  # in the system turn; question: before the last user turn's text
    c.context.max_tokens = 1024  # added to a prompt; longer ones are refused
    c.reward = make_reward()
    # The distribution that samples are drawn from; the plain one by default, as others change what
    # is learned. Losses of drawn tokens (rewards, opd_sampled, k2, k3) read all models at this
    # temperature.
    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0  # 0: greedy
    c.sampling.top_k = 0  # 0: off
    c.sampling.top_p = 1.0  # 1: off
    c.sampling.min_p = 0.0  # 0: off
    c.sampling.presence_penalty = 0.0  # subtracted from logits of tokens in the response; 0: off

    c.rollout = make_rollout()
    c.optim = make_optim()
    return c.lock()


def make_evaluation() -> ConfigDict:
    """Evaluation during training."""
    c = ConfigDict()
    c.every = 0  # steps between evaluations, and after each stage; 0: never
    c.benchmark = "arithmetic"
    c.data = ""  # PATH.jsonl or hf:NAME:CONFIG:SPLIT; arithmetic makes its own
    # Further benchmarks, evaluated right after this one: pairs of a name and its data,
    # (("ifeval", "hf:"), ...). Their figures are eval/NAME/accuracy and so on.
    c.more = ()
    c.limit = 200  # first problems; 0: all
    c.protocol = "greedy"  # how to sample, see distill/evaluation/protocols.py
    c.samples = 0  # responses to each problem; 0: the protocol's
    c.max_new_tokens = 0  # longest response; 0: the protocol's, less where positions leave less
    c.batch_size = 64  # responses sampled together
    c.best = "accuracy"  # keep the checkpoint with the highest NAME; "-NAME": lowest; "": none
    return c.lock()


def make_log() -> ConfigDict:
    """Settings of what is logged, and where it goes."""
    c = ConfigDict()
    # Where rows, transcripts, evaluations and this config go, besides the files of the run:
    # tensorboard (WORKDIR/tensorboard), and wandb, trackio and mlflow, whose clients must be
    # installed, and read their own variables: WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID ...
    c.to = ("tensorboard",)
    c.transcripts_every = 50  # steps between files of sampled transcripts
    c.transcripts = 8  # rows in each
    c.print_every = 0  # steps between printed transcripts, of one response each; 0: none
    # Compare so many likeliest tokens of teacher and student, and list them in transcripts, where
    # `report` shows them; 0: off; slow.
    c.overlap_top_k = 0
    return c.lock()


def make_alerts() -> ConfigDict:
    """Settings of what stops a run by itself, and what it warns of, once in a stage, as it begins
    (distill/training/alerts.py). "Start" means the first 10 steps of the stage, "now" the last 5.
    """
    c = ConfigDict()
    # An update whose loss or gradient is not finite is skipped, and a sampled response with NaN
    # logits left out (with the other samples of its prompt, if there is a reward). After so many
    # steps with either in a row the run stops, at a checkpoint; 0: never.
    c.max_skipped_steps = 3
    # A step, or an evaluation, that takes longer than this, and than ten times the median of those
    # before it, hangs: the stacks of all threads are printed, with what it is doing. Compiling does
    # not count. 0: off.
    c.hang_seconds = 1800.0
    c.hang_exits = False  # a hang ends the run with code 1, and a launcher starts it again
    # Rules that stop the run, too: loss, length, truncation, groups, entropy, overlap, accuracy.
    c.stop_on = ()
    # Where the rules begin. 0: off.
    c.loss_spike = 6.0  # standard deviations of the loss or gradient norm, over 128 steps
    c.length_drop = 0.25  # length: share of the mean length at the start
    c.truncation = 0.5  # share of truncated responses now, if twice that at the start
    c.entropy_drop = 0.1  # entropy: share of the entropy at the start
    c.overlap_drop = 0.1  # overlap: fall of train/top_overlap, of 1 (log.overlap_top_k)
    c.accuracy_drop = 0.1  # accuracy: fall of eval/accuracy below its best, of 1
    return c.lock()


def make_mesh() -> ConfigDict:
    """Devices along each axis of the mesh; -1: all that are left.

    On TPU an axis should be one of the torus (8 of v5e's 8x8): across two of them, gradients are
    summed whole on every device.
    """
    c = ConfigDict()
    c.data = 1  # splits rows, weights whole; for several slices a multiple of their number
    c.fsdp = -1  # splits rows and weights; these are fetched layer by layer
    # Splits heads and feed-forward, and for long rows the tokens between them: each layer's
    # activations stay the same size, and decoding holds 1/tensor of the weights. Divides the
    # key-value heads.
    c.tensor = 1
    # Splits tokens of long rows, and in attention their heads: tensor*context divides the query
    # heads. Like fsdp for weights, and for rows while sampling.
    c.context = 1

    # Models with experts only:
    c.expert = 1  # splits experts, whose number it divides; like data for all other weights
    return c.lock()


def get_config(arg: str = "") -> ConfigDict:
    """Returns the base recipe: on-policy distillation from a teacher's distribution."""
    if arg:
        raise ValueError(f"configs/base.py takes no argument, got {arg!r}")
    c = ConfigDict()
    c.seed = 0  # of data order, sampling and random initialisation
    c.stages = ("opd",)  # names of the sub-configs below, in the order they run
    c.unsafe_code = False  # where no sandbox works, run a model's programs with your rights

    c.student = ConfigDict()
    c.student.path = ""  # a model directory in Hugging Face format, or a hub id
    # "": its own; or a model whose tokenizer and chat template to use, with the same ids for the
    # student's tokens: for a Base student of a post-trained teacher, the teacher.
    c.student.tokenizer = ""
    c.student.random_init = False  # take config and tokenizer from path, weights at random
    # Of activations; trained parameters are always float32. float32 is multiplied at full precision
    # on every device: no TF32 on GPUs, no bfloat16 passes on TPUs (policy.use).
    c.student.dtype = "bfloat16"
    # Of frozen weights: LoRA's base, or the reference of a loss that has one. bfloat16, float32, or
    # 8 bits as for the teacher.
    c.student.param_dtype = "bfloat16"
    c.student.remat = True  # recompute each layer in the backward pass: less memory, 4/3 the time
    # Decay of a moving average of the trained parameters (with LoRA, its factors) after each
    # update, over all stages; used by a teacher's path and `export --average`. 0: none is kept.
    c.student.ema_decay = 0.0
    c.student.lora = ConfigDict()  # path may name a PEFT adapter of this shape to go on from
    c.student.lora.rank = 0  # 0: train all parameters; else low-rank terms beside the frozen base
    c.student.lora.alpha = 32.0  # the terms are scaled by alpha / rank
    c.student.lora.rslora = False  # scale by alpha / sqrt(rank)
    # Projections; the last three include those of experts.
    c.student.lora.targets = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )

    # Models with experts only:
    c.student.router_aux_loss_coef = 0.0  # weight of the load-balancing loss; 0.001 is usual
    # The update sends each token to the experts that the sampler chose (R3, arXiv 2510.11370), so
    # that rounding flips no choice between the two. 2·A bytes a token and layer on the host.
    c.student.replay_routing = False

    c.teacher = make_teacher()  # for stages that have one

    c.mesh = make_mesh()
    # Teachers and references on devices of their own, the last ones of each process, with their own
    # axes, so that neither takes the other's memory. Hidden states travel between the meshes, and
    # each output head once. 0: the same devices.
    c.teacher_mesh = make_mesh().unlock()
    c.teacher_mesh.devices = 0

    c.attention = "auto"  # splash on TPU, cudnn on GPU, else xla; all compute the same
    # On GPUs: a run that is killed and resumed, or repeated, has the same bits, as on CPUs and TPUs
    # without it. Slower there: no atomic additions, no autotuned kernels.
    c.deterministic = False
    # MiB of float32 logits of one chunk of the loss on a device; several times that is in memory.
    # 0: 128, on GPUs 1024. Each chunk reads the heads and adds to a gradient of their size, so
    # smaller chunks wait for memory.
    c.loss_chunk_mib = 0.0

    # A directory of compiled programs, for faster starts; gs://… for the hosts of a pod. It holds
    # code: share it with nobody. auto: JAX_COMPILATION_CACHE_DIR, or, for a run of one process,
    # ~/.cache/qwen3-distill/compiled, which keeps at most 4 GiB. "": JAX's, or none.
    c.compilation_cache = "auto"

    c.checkpoint = ConfigDict()  # files of the run
    c.checkpoint.every = 100  # steps
    # Also as soon as the next step would end later than this after the last save, so that a run
    # that is killed loses no more (or one step, where that is longer); 0: never.
    c.checkpoint.every_minutes = 10.0
    c.checkpoint.keep = 2  # newest checkpoints kept; one more while it is written
    c.checkpoint.keep_every = 0  # keep its multiples as well; 0: none
    c.log = make_log()
    c.alerts = make_alerts()
    c.eval = make_evaluation()
    c.sft = make_stage("sft")
    c.opd = make_stage("opd")
    for part in c.values():
        if isinstance(part, ConfigDict):
            part.lock()  # refuses keys that it does not have; c itself may get stages and teachers
    return c
