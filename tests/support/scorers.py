"""A teacher as a server would give it, computed in this process."""

import concurrent.futures
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.batch import Batch
from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.teachers.outputs import OUTPUT_FIELDS, ResponseOutput, ScorerInfo
from models import transformer
from models.errors import SourceFailure, UserError

LENGTH = 128  # tokens that every sequence is padded to, so that one program scores them all


class LocalScorer:
    """Scores responses one by one with a model that is loaded here, in float32.

    `asked` records what it is asked for. It fails from request number `fails_at` on.
    """

    def __init__(self, path: str, fields: Sequence[str] = (), k: int = 8) -> None:
        described = policy.make_abstract(path, "float32", False, mesh_lib.make_mesh(1, 1, 1))
        self.policy, self.k = policy.load(described, "float32"), k
        self.fields = fields or ("logp", "top_ids", "top_logp", "hidden")
        self.asked: list[tuple[list[int], list[int]]] = []
        self.fails_at = 10**9
        self.closed = False
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._lock = threading.Lock()

    @property
    def info(self) -> ScorerInfo:
        config = self.policy.config
        given = [name for name, fields in OUTPUT_FIELDS.items() if set(fields) <= {*self.fields}]
        return ScorerInfo(
            self.policy.path,
            tuple(given),
            config.vocab_size,
            context_length=LENGTH,
            hidden_size=config.hidden_size,
            hidden_dtype="float32",
            model_hash=f"hash of {self.policy.path}",
        )

    @property
    def head_VE(self) -> np.ndarray:
        return np.asarray(transformer.get_output_head(self.policy.params))

    def submit(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        where: str = "",
        limit: int | None = None,
    ) -> concurrent.futures.Future[ResponseOutput]:
        with self._lock:
            response = response[:limit]
            self.asked.append(([*prompt], [*response]))
            if len(self.asked) > self.fails_at:
                future: concurrent.futures.Future = concurrent.futures.Future()
                future.set_exception(SourceFailure("http://teacher: does not answer"))
                return future
        return self._pool.submit(self.score, [*prompt], [*response])

    def score(self, prompt: list[int], response: list[int]) -> ResponseOutput:
        return ResponseOutput(
            **{name: self.compute(prompt, response)[name] for name in self.fields}
        )

    def compute(self, prompt: list[int], response: list[int]) -> dict[str, np.ndarray]:
        ids = prompt + response
        if len(ids) > LENGTH:
            raise UserError(f"{len(ids)} tokens")
        tokens: Any = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        real: Any = np.arange(LENGTH)[None] < len(ids)
        positions: Any = np.arange(LENGTH, dtype=np.int32)[None]
        inputs = Batch(tokens, positions, real.astype(np.int32), real)
        params = self.policy.params
        hidden_BTE = local.compute_hidden(self.policy.model, params, None, inputs, None)
        hidden_TE = hidden_BTE[0, len(prompt) - 1 : len(ids) - 1]
        with jax.default_matmul_precision("float32"):
            logits_TV = hidden_TE @ transformer.get_output_head(params).T
        logq_TV = np.asarray(jax.nn.log_softmax(logits_TV))
        top_logp, top_ids = jax.lax.top_k(jnp.asarray(logq_TV), self.k)
        return {
            "logp": logq_TV[np.arange(len(response)), response],
            "top_ids": np.asarray(top_ids, np.int32),
            "top_logp": np.asarray(top_logp),
            "hidden": np.asarray(hidden_TE),
        }

    def close(self) -> None:
        self.closed = True  # but a test may run another training with it
