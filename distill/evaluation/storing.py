"""Stores what a model says of responses, so that a run can learn from it without the model.

Responses are read twice: first to check them and to count what is to be stored, then shard by shard
to score them. So memory holds one shard at a time, and a hash and two numbers of each response.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import math
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from distill.data import chat, dataset, sources
from distill.data.examples import Encoding, Example, make_example
from distill.evaluation import scoring
from distill.policy import identity, policy
from distill.policy.policy import Policy
from distill.runtime import paths, run_files
from distill.runtime.progress import show_progress
from distill.teachers import stored, stored_files, wire
from distill.teachers.outputs import InvalidOutput, ResponseOutput, check_output
from distill.teachers.stored_files import Manifest, Settings, Shard
from models import transformer
from models.errors import UserError

SHARD_BYTES = 2**29  # of a shard, unless a single response is longer; three times that in memory


@dataclasses.dataclass(frozen=True)
class Responses:
    """Responses by number: `read(i)` gives the examples of a row, several if it has both modes."""

    name: str
    num_rows: int
    read: Callable[[int], list[Example]]


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The distinct responses of a source, in order."""

    source: Responses
    rows: array  # of each response its row, ...
    places: array  # ... and which of the row's examples it is
    lengths: array  # in tokens
    keys: list[bytes]

    def read(self, first: int, last: int) -> list[Example]:
        """Reads the responses from number `first` to before `last`.

        Raises UserError if a row is not what it was when the responses were selected.
        """
        examples = []
        for number in range(first, last):
            row, place = self.rows[number], self.places[number]
            found = self.source.read(row)[place:]
            if not found or hash_example(found[0]) != self.keys[number]:
                raise UserError(f"{self.source.name}: row {row} has changed while it was scored")
            examples.append(found[0])
        return examples


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """Responses that are scored by a loaded model, into a directory."""

    model: Policy
    selection: Selection
    settings: Settings
    out: epath.Path
    batch_size: int


def get_prompt(example: Example) -> list[int]:
    """Returns the prompt that a teacher reads."""
    return example.teacher_prompt or example.prompt


def hash_example(example: Example) -> bytes:
    return stored_files.hash_response(get_prompt(example), example.response)


def open_token_rows(source: str) -> Responses:
    """Opens the responses of rows of token ids: those that `generate` wrote, all samples of each,
    and rows of `tokens` and `response_tokens`.

    Raises:
      UserError: if there are none.
    """
    rows = sources.open_rows(source)
    if sources.has_samples(rows):
        rows = sources.expand_samples(rows, "all", None)

    def read(index: int) -> list[Example]:
        row, where = rows.read_row(index), rows.locate_row(index)
        if not {"tokens", "response_tokens"} <= row.keys():
            raise UserError(
                f"{where}: neither samples nor tokens and response_tokens among its fields "
                f"{sorted(row)}; text becomes tokens as the config of a stage says: score it with "
                "--config=... --stage=... in place of --tokens"
            )
        return [make_example(row, where, Encoding(None))]

    return Responses(source, len(rows), read)


def select_responses(source: Responses, vocab_size: int, limit: int) -> Selection:
    """Reads all responses once, and keeps the first of those that are the same.

    Raises:
      UserError: naming the first that the model cannot read.
    """
    seen: dict[bytes, None] = {}
    rows, places, lengths = array("q"), array("b"), array("i")
    for row in range(source.num_rows):
        for place, x in enumerate(source.read(row)):
            ids = [*get_prompt(x), *x.response]
            dataset.require_ids(ids, vocab_size, x.where)
            if len(ids) > limit:
                raise UserError(
                    f"{x.where}: {len(ids)} tokens exceed the model's {limit} positions"
                )
            if (key := hash_example(x)) not in seen:
                seen[key] = None
                rows.append(row)
                places.append(place)
                lengths.append(len(x.response))
    return Selection(source, rows, places, lengths, list(seen))


def make_settings(
    subject: Policy, selection: Selection, output: str, top_k: int, param_dtype: str
) -> Settings:
    """Describes a job."""
    step = policy.find_newest_step(subject.path)
    return Settings(
        model=subject.path,
        model_hash=identity.hash_parts(identity.describe_model(subject.path)),
        tokenizer_hash=_hash_tokenizer(subject.tokenizer_dir) if subject.tokenizer else "",
        step=-1 if step is None else step,
        rows=selection.source.name,
        rows_hash=hashlib.sha256(b"".join(selection.keys)).hexdigest()[:16],
        output=output,
        top_k=top_k,
        dtype=subject.dtype,
        param_dtype=param_dtype,
        vocab_size=subject.config.vocab_size,
        hidden_size=subject.config.hidden_size,
        responses=len(selection.keys),
        tokens=sum(selection.lengths),
    )


def store_scores(
    subject: Policy, selection: Selection, settings: Settings, out: epath.Path, batch_size: int
) -> Manifest:
    """Loads the described `subject`, scores the responses and writes them to the directory `out`.

    Goes on after the last whole shard of an earlier call with the same settings.

    Raises:
      UserError: if `out` holds another work or other files, or has no room.
    """
    before = _read_earlier(out, settings)
    shards = before.shards if before else ()
    counts = [shard.responses for shard in shards]
    left = selection.lengths[sum(counts) :]
    counts += plan_shards(left, stored_files.count_bytes_per_token(settings))
    with concurrent.futures.ThreadPoolExecutor(stored_files.THREADS) as pool:
        found = enumerate(pool.map(functools.partial(_is_intact, out), shards))
        intact = {number for number, is_intact in found if is_intact}
    if before and len(intact) == len(counts) and _has_first_files(out, before):
        return before
    _require_room(out, settings, sum(shards[number].tokens for number in intact))
    with policy.use(subject):
        loaded = policy.load(subject, settings.param_dtype)
        if loaded.step is not None and loaded.step != settings.step:
            raise UserError(
                f"{subject.path}: the arrays of checkpoint {settings.step} are damaged; move it "
                "away to score with the one before"
            )
        job = Job(loaded, selection, settings, out, batch_size)
        manifest = _write_first_files(job, before)
        done, first, outputs = sum(counts[number] for number in intact), 0, None
        with show_progress(settings.responses, done, "score", batch_size) as bar:
            for number, count in enumerate(counts):
                if number in intact:
                    first, outputs = first + count, None
                    continue
                outputs = outputs or _score_from(job, first)
                scored = []
                for output in itertools.islice(outputs, count):
                    scored.append(output)
                    bar.update(done + len(scored))
                keys = selection.keys[first : first + count]
                shard = stored_files.write_shard(out, number, keys, scored)
                shards = (*shards[:number], shard, *shards[number + 1 :])
                manifest = dataclasses.replace(manifest, shards=shards)
                stored_files.write_manifest(out, manifest)
                done, first = done + count, first + count
    return manifest


def _hash_tokenizer(directory: epath.PathLike) -> str:
    return identity.hash_parts(identity.describe_tokenizer(Path(directory)))


def _has_first_files(out: epath.Path, before: Manifest) -> bool:
    """Returns False, after saying why, if the head or the tokenizer is to be written again."""
    try:
        if before.head_hash:
            stored_files.read_head(out, before)
        stored.read_tokenizer(out, before)
    except UserError as error:
        run_files.log_line(f"warning: {error}")
        return False
    return True


def _is_intact(out: epath.Path, shard: Shard) -> bool:
    """Returns False, after saying why, for a shard that is to be written again."""
    try:
        stored_files.read_index(out, shard)
    except UserError as error:
        run_files.log_line(f"warning: {error}")
        return False
    return True


def plan_shards(lengths: Sequence[int], bytes_per_token: int) -> list[int]:
    """Returns the numbers of responses of the shards that hold responses of these lengths."""
    counts, size = [], math.inf
    for length in lengths:
        nbytes = length * bytes_per_token
        if size + nbytes > SHARD_BYTES:
            counts.append(0)
            size = 0
        counts[-1] += 1
        size += nbytes
    return counts


def _read_earlier(out: epath.Path, settings: Settings) -> Manifest | None:
    """Returns what an earlier call has written to `out`, if anything."""
    manifest, head = stored_files.MANIFEST, stored_files.HEAD_FILE
    if not (out / manifest).is_file():
        known = {manifest, head, stored_files.TOKENIZER_DIR, "lock"}
        names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        if others := [name for name in names if name.removesuffix(".tmp") not in known]:
            raise UserError(
                f"--out={out}: holds {others[0]} and no {manifest}; name a new directory"
            )
        return None
    before = stored_files.read_manifest(out)
    then, now = dataclasses.asdict(before.settings), dataclasses.asdict(settings)
    names = {"model_hash": f"the model ({then['model']})", "rows_hash": "the responses"}
    for key in now:
        if key not in ("model", "rows") and then[key] != now[key]:
            raise UserError(
                f"--out={out}: holds another work: {names.get(key, key)} was {then[key]!r}, now "
                f"{now[key]!r}; name a new directory, or delete this one to start over"
            )
    return before


def _require_room(out: epath.Path, settings: Settings, tokens_done: int) -> None:
    if paths.is_remote(out):
        return
    needed = (settings.tokens - tokens_done) * stored_files.count_bytes_per_token(settings)
    if settings.output == "hidden":
        needed += settings.vocab_size * settings.hidden_size * jnp.dtype(settings.dtype).itemsize
    folder = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        gib = 2**30
        sizes = f"{free / gib:,.2f} GiB free, {needed / gib:,.2f} GiB are to be written"
        raise UserError(f"--out={out}: has {sizes}")


def _write_first_files(job: Job, before: Manifest | None) -> Manifest:
    """Writes all but the shards, also what is there already; returns the manifest so far."""
    out, head_VE = job.out, None
    if job.settings.output == "hidden":
        head_VE = np.asarray(jax.device_get(transformer.get_output_head(job.model.params)))
    manifest = before or Manifest(job.settings, "" if head_VE is None else wire.hash_head(head_VE))
    stored_files.write_manifest(out, manifest)
    if head_VE is not None:
        if wire.hash_head(head_VE) != manifest.head_hash:
            raise UserError(f"--out={out}: was written with another output head; name a new one")
        stored_files.write_head(out, head_VE)
    if job.model.tokenizer is not None:
        for name in chat.TOKENIZER_FILES:
            file = job.model.tokenizer_dir / name
            if file.is_file():
                paths.write_bytes(out / stored_files.TOKENIZER_DIR / name, file.read_bytes())
    return manifest


def _score_from(job: Job, first: int) -> Iterator[ResponseOutput]:
    """Yields what the model says of the responses from number `first` on.

    A batch holds the same responses wherever a job begins, so one that goes on writes the same bits
    as one that was never stopped.
    """
    settings, size = job.settings, job.batch_size
    for start in range(first // size * size, settings.responses, size):
        examples = job.selection.read(start, min(start + size, settings.responses))
        scored = scoring.score_responses(
            job.model,
            [(get_prompt(x), x.response) for x in examples],
            batch_size=size,
            top_k=settings.top_k,
            with_hidden=settings.output == "hidden",
        )
        for number, (x, output) in enumerate(zip(examples, scored, strict=True), start=start):
            if number < first:
                continue
            try:
                check_output(output, len(x.response), settings.vocab_size, top_k=settings.top_k)
            except InvalidOutput as error:  # NaN logits, for example
                raise UserError(f"{x.where}: its score {error} ({settings.model})") from None
            yield output
