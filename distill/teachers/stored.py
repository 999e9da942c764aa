"""A teacher whose scores are stored: `score --output` wrote what its model says of responses.

A response is found by a hash of its tokens and of those of the teacher's prompt, so rows may come
in any order, from any file, and several times.
"""

import concurrent.futures
import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerBase

from distill.data import chat, retry
from distill.policy import identity
from distill.policy.policy import Policy
from distill.teachers import stored_files
from distill.teachers.outputs import (
    OUTPUT_FIELDS,
    InvalidOutput,
    ResponseOutput,
    ScorerInfo,
    check_output,
)
from distill.teachers.stored_files import Manifest
from models.errors import SourceFailure, UserError


class StoredScorer:
    """The scores in a directory. A Scorer (outputs.py), and safe to call from several threads.

    Opening it reads the index of every shard and the output head. Each response that is read is
    compared with its checksum.

    Args:
      output: what is read of a response, a key of OUTPUT_FIELDS.
      top_k: likeliest tokens that are read at least, with output="top".

    Raises:
      UserError: if the scores are incomplete, cut short, altered or of another form.
    """

    def __init__(self, directory: str, output: str, top_k: int = 0) -> None:
        self._directory = epath.Path(directory)
        self._manifest = stored_files.read_manifest(directory)
        settings, self._top_k = self._manifest.settings, top_k
        outputs = tuple(dict.fromkeys((settings.output, "token")))
        dtypes = dict.fromkeys((settings.param_dtype, settings.dtype))
        self.info = ScorerInfo(
            model=f"scores of {settings.model}",
            outputs=outputs,
            vocab_size=settings.vocab_size,
            top_k=settings.top_k,
            hidden_size=settings.hidden_size if settings.output == "hidden" else 0,
            hidden_dtype=settings.dtype,
            # With what else its outputs depend on.
            model_hash=f"{settings.model_hash} in {' and '.join(dtypes)}",
            tokenizer_hash=settings.tokenizer_hash,
            head_hash=self._manifest.head_hash,
        )
        if output not in outputs:
            raise UserError(
                f"{directory}: holds {' and '.join(outputs)}, but {output} is asked for; score "
                f"again with --output={output}"
            )
        if top_k > settings.top_k:
            raise UserError(
                f"{directory}: holds the {settings.top_k} likeliest tokens, but {top_k} are asked "
                f"for; score again with --top_k={top_k}"
            )
        self._fields = OUTPUT_FIELDS[output]
        _require_complete(self._directory, self._manifest)
        self.head_VE: np.ndarray | None = None
        if output == "hidden":
            self.head_VE = stored_files.read_head(self._directory, self._manifest)
        read_index = functools.partial(stored_files.read_index, self._directory)
        with concurrent.futures.ThreadPoolExecutor(stored_files.THREADS) as pool:
            self._shards = list(pool.map(read_index, self._manifest.shards))
        for shard in self._shards:
            if not set(self._fields) <= shard.fields.keys():
                path = self._directory / shard.file
                raise UserError(f"{path}: holds {' '.join(shard.fields)}, not {output}")
        self._pool = concurrent.futures.ThreadPoolExecutor(stored_files.THREADS, "stored")
        # key -> (shard, number of the response in it)
        self._places = {
            key: (number, row)
            for number, shard in enumerate(self._shards)
            for row, key in enumerate(shard.keys)
        }

    def require_response(self, prompt: Sequence[int], response: Sequence[int], where: str) -> None:
        """Raises UserError unless the response is stored. `where` names its row."""
        self._find_response(prompt, response, where)

    def submit(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        where: str = "",
        limit: int | None = None,
    ) -> concurrent.futures.Future[ResponseOutput]:
        """Reads the output of a response, as `outputs.Scorer.submit` says."""
        shard, row = self._find_response(prompt, response, where)
        return self._pool.submit(self._read_output, shard, row, limit)

    def _find_response(
        self, prompt: Sequence[int], response: Sequence[int], where: str
    ) -> tuple[int, int]:
        place = self._places.get(stored_files.hash_response(prompt, response))
        if place is None:
            settings = self._manifest.settings
            raise UserError(
                f"{where}: its prompt of {len(prompt)} and response of {len(response)} tokens are "
                f"not among the {settings.responses:,} responses of {settings.rows} that are "
                f"stored in {self._directory}: score the rows that the stage reads, with its "
                "template, thinking mode, tokenizer and context (score --config=... --stage=...)"
            )
        return place

    def _read_output(self, number: int, row: int, limit: int | None) -> ResponseOutput:
        shard = self._shards[number]

        def read(row: int) -> ResponseOutput:
            return shard.read_output(self._directory, row, self._fields)

        path = self._directory / shard.file
        sizes = {"hidden_size": self.info.hidden_size} if "hidden" in self._fields else {}
        try:
            output = retry.retry_reads(read, str(path))(row)
            count, vocab_size = int(shard.lengths_R[row]), self.info.vocab_size
            check_output(output, count, vocab_size, top_k=self._top_k, **sizes)
        except InvalidOutput as error:
            raise SourceFailure(f"{path}: its response {row} {error}") from None
        if limit is None:
            return output
        fields = output.get_fields().items()
        return dataclasses.replace(output, **{name: x[:limit] for name, x in fields})

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _require_complete(directory: epath.Path, manifest: Manifest) -> None:
    if not manifest.is_complete:
        done = sum(shard.responses for shard in manifest.shards)
        raise UserError(
            f"{directory}: holds {done:,} of {manifest.settings.responses:,} responses; the same "
            "call of score goes on"
        )


def check_tokenizer(directory: str, student: Policy) -> None:
    """Raises UserError if the tokens that were scored mean others to the student, or the tokenizer
    beside the scores is not the one that was written."""
    folder = epath.Path(directory)
    tokenizer = read_tokenizer(folder, stored_files.read_manifest(directory))
    names = student.path, str(folder / stored_files.TOKENIZER_DIR)
    chat.require_same_tokenizer(student.tokenizer, tokenizer, names)


def read_tokenizer(directory: epath.Path, manifest: Manifest) -> PreTrainedTokenizerBase | None:
    """Reads the tokenizer that is stored; None if the model had none.

    Raises:
      UserError: if it is not as it was written.
    """
    folder, expected = directory / stored_files.TOKENIZER_DIR, manifest.settings.tokenizer_hash
    if not expected:
        return None
    with tempfile.TemporaryDirectory() as copy:  # the library reads no buckets
        for name in chat.TOKENIZER_FILES:
            if (folder / name).is_file():
                (Path(copy) / name).write_bytes((folder / name).read_bytes())
        if identity.hash_parts(identity.describe_tokenizer(copy)) != expected:
            raise UserError(f"{folder}: was altered since it was written; {stored_files.REMEDY}")
        return chat.load_tokenizer(copy)
