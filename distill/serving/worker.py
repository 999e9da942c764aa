"""The thread that owns the device: it generates and scores for all requests together.

Generation joins the slots of one running Engine; scoring is done in batches between two segments of
decoding. So neither waits for the end of the other.
"""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from distill.policy import policy
from distill.policy.policy import Policy
from distill.rollout import sampler
from distill.rollout.engine import Engine
from distill.rollout.options import RolloutOptions, make_cache_shape
from distill.rollout.sampling import Sampling
from distill.rollout.sequence import Sequence
from distill.runtime import mesh as mesh_lib
from distill.serving.errors import ApiError
from distill.serving.jobs import Generation, Job, Response, Scoring
from distill.serving.score_queue import ScoreQueue, find_fault
from models import transformer
from models.errors import UserError

STREAM_STEPS = 8  # decoding steps between two pieces of a response that is streamed
RETRY_SECONDS = 1  # after which a full queue may have room


class Worker:
    """Serves jobs on the devices of a policy, from `load` and `start` until `stop`.

    Args:
      subject: a described policy, whose weights are loaded here.
      param_dtype: of the weights (policy.load).
      max_queue: sequences at most that wait for a slot, or to be scored.
      call_soon: runs a function in the thread that receives results.
    """

    def __init__(
        self,
        subject: Policy,
        param_dtype: str,
        options: RolloutOptions,
        max_queue: int,
        call_soon: Callable[[Callable[[], None]], Any],
    ) -> None:
        self.counts: Counter[str] = Counter()  # tokens: prompt, generated and scored
        self.max_queue, self.call_soon = max_queue, call_soon
        self.failure: BaseException | None = None
        self.head_VE: np.ndarray | None = None  # once it is ready
        self.step: int | None = None  # of the run's checkpoint that is served
        self._subject, self._param_dtype, self._options = subject, param_dtype, options
        self._engine: Engine | None = None
        self._scores: ScoreQueue | None = None
        self._lock = threading.Condition()
        self._inbox: list[Job] = []
        self._cancelled: list[Job] = []
        self._num_pending = {Generation: 0, Scoring: 0}  # sequences accepted and not done
        self._is_stopping = False
        self._responses: dict[int, tuple[Generation, Response]] = {}  # by id of the sequence
        self._outbox: list[tuple[Callable[[Any], Any], Any]] = []
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def load(self) -> None:
        """Loads the weights and compiles the programs of generation, in the calling thread: in the
        main one a signal interrupts it."""
        with policy.use(self._subject):
            self._prepare()

    def start(self) -> None:
        """Starts the thread, after `load`."""
        self._thread.start()

    def check(self) -> None:
        """Raises what has ended the thread, if anything has."""
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Waits for the thread to end, as long as the device is busy."""
        self._thread.join()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends the thread after what the device is doing; jobs that are not done fail."""
        with self._lock:
            self._is_stopping = True
            self._lock.notify()

    @property
    def num_pending(self) -> int:
        """Sequences that were accepted and are not done."""
        return sum(self._num_pending.values())

    @property
    def num_decoding(self) -> int:
        """Slots in use."""
        return sum(1 for _ in self._engine.scheduler.iter_slots()) if self._engine else 0

    def submit(self, job: Job) -> None:
        """Accepts a job.

        Raises:
          ApiError: if too many sequences wait already (429), or the server stops.
        """
        kind, slots = type(job), self._options.slots if isinstance(job, Generation) else 0
        if job.num_sequences > self.max_queue:
            raise ApiError(
                f"{job.num_sequences} sequences in one request: at most {self.max_queue}"
            )
        with self._lock:
            if self._is_stopping or self.failure:
                raise ApiError("the server is stopping", 503, retry_after=RETRY_SECONDS)
            if self._num_pending[kind] + job.num_sequences > slots + self.max_queue:
                waiting = max(0, self._num_pending[kind] - slots)
                raise ApiError(
                    f"{waiting} sequences wait already; try again later",
                    *(429, None, "queue_full"),
                    retry_after=RETRY_SECONDS,
                )
            self._num_pending[kind] += job.num_sequences
            self._inbox.append(job)
            self._lock.notify()

    def cancel(self, job: Job) -> None:
        """Frees what a job holds; nothing more is delivered to it. Does nothing if it is done."""
        with self._lock:
            self._cancelled.append(job)
            self._lock.notify()

    def _run(self) -> None:
        try:
            with policy.use(self._subject), mesh_lib.use_mesh(self._mesh):
                self._serve()
        except BaseException as error:  # told to all who wait, and raised by `check`
            self.failure = error
        finally:
            with self._lock:
                self._is_stopping = True
                jobs: dict[int, Job] = {id(job): job for job, _ in self._responses.values()}
                jobs |= {id(job): job for job in self._inbox}
                jobs |= {id(job): job for job in self._scores.list_jobs()} if self._scores else {}
            for job in jobs.values():
                self._outbox.append((job.deliver, ApiError("the server has stopped", 503)))
            self._flush()

    def _prepare(self) -> None:
        """Loads the weights, makes the engine and compiles its programs."""
        options, described = self._options, self._subject
        self._mesh = mesh_lib.to_decode_mesh(policy.get_mesh(described))
        dtype = described.dtype
        try:
            shape = make_cache_shape(
                *(options, described.config, self._mesh, dtype), options.slots, options.max_length
            )
        except UserError as error:  # names an option, which is a flag of the same name
            raise UserError(f"--{error}") from None
        subject = policy.load(described, self._param_dtype)
        model = sampler.SamplingModel(subject.model, subject.params, subject.stop_ids)
        self.step = subject.step
        with mesh_lib.use_mesh(self._mesh):
            decoder, params = sampler.prepare_decoder(
                model, Sampling(), options, shape, by_row=True
            )
            # Scoring reads the weights that decode, so that they are held once.
            del model, subject
            self._engine = engine = Engine(
                *(decoder, params, [], options, self.step or 0, Counter()),
                ended=self._has_ended,
                harvested=self._read_sequences,
            )
            engine.warm_up(lambda: None)
            self._scores = ScoreQueue(
                decoder.model, params["params"], self._mesh, options.max_length
            )
            self._scores.warm_up()
            self.head_VE = np.asarray(jax.device_get(transformer.get_output_head(params["params"])))

    def _serve(self) -> None:
        engine, scores = self._engine, self._scores
        assert engine is not None and scores is not None
        is_running = False
        while True:
            with self._lock:
                while not (self._inbox or self._cancelled or self._is_stopping):
                    if is_running or len(scores):
                        break
                    self._lock.wait()
                if self._is_stopping:
                    return
                jobs, self._inbox = self._inbox, []
                cancelled, self._cancelled = self._cancelled, []
            for job in jobs:
                self._admit(job)
            for job in cancelled:
                self._drop(job)
            for job in scores.score_batch():
                self._finish_scoring(job)
            self._flush()
            before = engine.counts.copy()
            is_running = engine.advance(self._get_token_budget())
            self.counts["generated"] += engine.counts["tokens"] - before["tokens"]
            self.counts["prompt"] += engine.counts["prompt_tokens"] - before["prompt_tokens"]

    def _get_token_budget(self) -> int | None:
        """Returns the tokens of the next segment, which is short while a response is streamed."""
        if not any(job.options.is_stream for job, _ in self._responses.values()):
            return None
        return STREAM_STEPS * min(self._options.slots, len(self._responses))

    def _admit(self, job: Job) -> None:
        assert self._engine is not None and self._scores is not None
        if isinstance(job, Scoring):
            self._scores.add_job(job)
            return
        options, numbers = job.options, range(len(job.prompts))
        # As `generate` numbers its rows and samples, so that a seed means the same there.
        pairs = [(number, sample) for number in numbers for sample in range(options.samples)]
        keys = make_keys(options.seed, pairs)
        for index, ((number, _), key) in enumerate(zip(pairs, keys, strict=True)):
            sequence = Sequence(
                job.prompts[number],
                key,
                job.limits[number],
                sampling=options.sampling,
                wants_logprobs=options.wants_logprobs,
            )
            response = Response(index, sequence, self._subject.tokenizer, options)
            job.responses.append(response)
            self._responses[id(sequence)] = job, response
            self._engine.scheduler.add_sequence(sequence)

    def _drop(self, job: Job) -> None:
        """Frees what a cancelled job holds: sequences in slots end with the next harvest."""
        assert self._engine is not None and self._scores is not None
        if job.is_cancelled:
            return
        job.is_cancelled = True
        if isinstance(job, Scoring):
            self._release(job, job.num_sequences if job.num_left else 0)
            return
        decoding = {id(slot.sequence) for slot in self._engine.scheduler.iter_slots()}
        for response in job.responses:
            if id(response.sequence) not in decoding and not response.is_done:
                response.sequence.finish_reason = "stop"  # the queue then drops it
                self._finish_response(job, response)

    def _has_ended(self, sequence: Sequence) -> bool:
        """Reads the tokens of an unfinished sequence; True if nobody wants more of them."""
        self._read_sequence(sequence)
        return id(sequence) not in self._responses

    def _read_sequences(self, sequences: list[Sequence]) -> None:
        """Passes on what is new of these sequences."""
        for sequence in sequences:
            self._read_sequence(sequence)
        self._flush()

    def _read_sequence(self, sequence: Sequence) -> None:
        if id(sequence) not in self._responses:
            return
        job, response = self._responses[id(sequence)]
        piece = None
        if not job.is_cancelled:
            try:
                piece = response.read_tokens()
            except Exception as error:  # of this request alone
                self._outbox.append((job.deliver, error))
                self.cancel(job)
                self._finish_response(job, response)
                return
        if piece is not None:
            self._outbox.append((job.deliver, piece))
        if job.is_cancelled or (piece is not None and piece.finish_reason):
            self._finish_response(job, response)

    def _finish_response(self, job: Generation, response: Response) -> None:
        response.is_done = True
        if self._responses.pop(id(response.sequence), None):
            self._release(job, 1)

    def _finish_scoring(self, job: Scoring) -> None:
        outputs = [x for x in job.outputs if x is not None]
        self.counts["scored"] += sum(x.num_tokens for x in outputs)
        self._release(job, job.num_sequences)
        self._outbox.append((job.deliver, find_fault(outputs) or outputs))

    def _release(self, job: Job, count: int) -> None:
        with self._lock:
            self._num_pending[type(job)] -= count

    def _flush(self) -> None:
        """Hands over all results in one call, which wakes the other thread once."""
        outbox, self._outbox = self._outbox, []

        def deliver_all() -> None:
            for deliver, value in outbox:
                deliver(value)

        if outbox:
            self.call_soon(deliver_all)


def make_keys(seed: int, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the key data of (prompt, sample) pairs under a seed."""
    padding = [(0, 0)] * ((1 << (len(pairs) - 1).bit_length()) - len(pairs))  # few shapes
    numbers, samples = zip(*pairs, *padding, strict=True)
    return sampler.make_row_keys(jax.random.key(seed), numbers, samples)[: len(pairs)]
