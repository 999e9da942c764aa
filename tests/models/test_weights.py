"""Tests loading from many shards: reads, memory, progress lines and errors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill.policy import policy
from distill.runtime import progress
from models import families, tensor_files, weights
from models.errors import UserError
from models.qwen3.config import SIZES
from tests.support.loading import counted, load
from tests.support.paths import ROOT
from tests.support.processes import find_free_port
from tests.support.tiny_models import tiny_qwen3

EVEN = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
EVEN |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    tiny_qwen3(directory, **EVEN).save_pretrained(directory, max_shard_size="20KB")  # pyright: ignore
    (directory / "model.safetensors").unlink()
    assert len(list(directory.glob("*.safetensors"))) > 5
    return directory


def stored(directory: Path) -> dict[str, np.ndarray]:
    files = (load_file(file) for file in directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sparse")
    mixture: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    mixture |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    fields: dict[str, Any] = EVEN | mixture
    tiny_qwen3(directory, **fields)
    return directory


@pytest.mark.parametrize("piece", [weights.PIECE_BYTES, 1], ids=["together", "apart"])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *(("sharded", sizes) for sizes in [(1, 1, 1), (1, 8, 1), (1, 1, 4), (1, 2, 4), (8, 1, 1)]),
        *(("sparse", sizes) for sizes in [(1, 1, 1, 8), (1, 2, 2, 2), (1, 8, 1)]),
    ],
    ids=str,
)
def test_every_tensor_is_read_once_for_all_devices(kind, sizes, piece, monkeypatch, request):
    """Each tensor is read whole with one slice, however devices divide it, instead of once per
    device. The layers of a parameter move to the devices together or one by one."""
    directory, read, progress = request.getfixturevalue(kind), [], []
    tensors = stored(directory)
    monkeypatch.setattr(tensor_files, "safe_open", counted(read))
    monkeypatch.setattr(weights, "PIECE_BYTES", piece)
    loaded, reads = load(directory, sizes, on_progress=progress.append)
    assert sorted(read) == sorted(tensor.nbytes for tensor in tensors.values())
    assert progress == list(range(1, reads + 1)) == list(range(1, len(tensors) + 1))
    actual = dict(
        weights.iter_tensors(loaded, families.read_config(directory), jnp.dtype("float32"))
    )
    assert actual.keys() == tensors.keys()
    assert all(np.array_equal(actual[name], tensor) for name, tensor in tensors.items())


def test_neighbouring_parts_are_read_together():
    def box(rows, columns):
        return (rows, columns)

    quarters = [box(r, c) for r in [(0, 4), (4, 8)] for c in [(0, 3), (3, 6)]]
    assert weights._merge_boxes(quarters) == [box((0, 8), (0, 6))]
    apart = [box((0, 4), (0, 3)), box((0, 4), (6, 9)), box((4, 8), (0, 3)), box((4, 8), (6, 9))]
    assert sorted(weights._merge_boxes(apart)) == [box((0, 8), (0, 3)), box((0, 8), (6, 9))]
    corner = [box((0, 4), (0, 3)), box((0, 4), (3, 6)), box((4, 8), (0, 3))]
    assert sorted(weights._merge_boxes(corner)) == [box((0, 4), (0, 6)), box((4, 8), (0, 3))]
    assert weights._merge_boxes([]) == []


PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
address, number, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, number)
from tests.support import loading
read = []
loading.tensor_files.safe_open = loading.counted(read)
loaded, _ = loading.load(directory, (1, 2, 4))
whole = jax.tree.leaves(loaded)[0].sharding.device_set
assert len(whole) == 8 and len(jax.local_devices()) == 4
print(len(read), sum(read))
"""


def test_a_process_reads_only_its_devices_parts(sharded):
    """Two processes of four devices with fsdp between them: each reads half of all but the
    norms."""
    address = f"localhost:{find_free_port()}"
    command = [sys.executable, "-c", PROCESS, address]
    started = [
        subprocess.Popen(
            [*command, str(i), str(sharded)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines()[-1] for process in started]
    tensors = stored(sharded)
    total = sum(tensor.nbytes for tensor in tensors.values())
    norms = sum(tensor.nbytes for name, tensor in tensors.items() if "norm" in name)
    assert 0 < norms < total / 20
    assert outputs == [f"{len(tensors)} {(total - norms) // 2 + norms}"] * 2


MEMORY = """
import sys, threading, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
from typing import Any
from tests.support import loading

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

loading.load(sys.argv[1], (1, 2, 4))  # libraries, the backend and the programs are there
before, seen, stop = status("RssAnon"), [], threading.Event()

def sample():
    while not stop.is_set():
        seen.append((status("RssAnon"), status("RssFile")))
        time.sleep(0.002)

thread = threading.Thread(target=sample)
thread.start()
loaded, _ = loading.load(sys.argv[1], (1, 2, 4))
stop.set()
thread.join()
landed = sum(s.data.nbytes for x in jax.tree.leaves(loaded) for s in x.addressable_shards)
anonymous, file = (max(column) for column in zip(*seen))
print(len(seen), landed, anonymous - before, file)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_needs_at_most_the_largest_tensor_beside_the_model(tmp_path, monkeypatch):
    """Loads 106 MiB of bfloat16 in 13 shards to float32. On this backend, device arrays are host
    memory too; beyond them, memory never exceeds the largest tensor, the embedding.

    Counts anonymous memory of the process (RssAnon), which is returned as soon as it is freed.
    Pages of mapped files come on top, but belong to the page cache, which the system reclaims as
    needed.
    """
    config = dataclasses.replace(
        SIZES["0.6b"],
        vocab_size=16_384,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    rng = np.random.default_rng(0)

    def random(leaf):
        bits = rng.integers(0, 2**14, leaf.shape, np.uint16)
        return bits.view(ml_dtypes.bfloat16)

    params = jax.tree.map(random, families.get_abstract_params(config)[0])
    monkeypatch.setattr(weights, "SHARD_BYTES", 8 * 2**20)
    weights.save(params, config, tmp_path, jnp.dtype("bfloat16"))
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    largest = max(shards)
    del params
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    frees = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | frees,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    samples, landed, anonymous, file = map(int, done.stdout.split())
    print(f"{len(shards)} shards of at most {largest}: {landed=} {anonymous=} {file=} {samples=}")
    assert len(shards) > 8 and samples > 20
    assert landed == pytest.approx(2 * sum(shards), rel=0.01)
    assert landed * 0.9 < anonymous < landed + largest


def test_progress_lines_without_a_terminal(sharded, capsys, monkeypatch):
    """None of a model that is read at once; of one that takes long, a line now and then."""
    subject = policy.make_abstract_for_inference(str(sharded), "float32")
    with policy.use(subject):
        policy.load(subject, "float32")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "PRINT_SECONDS", 0.0)
        policy.load(subject, "float32")
    lines = capsys.readouterr().err.splitlines()
    reads = weights.count_reads(
        subject.config, subject.params, jax.tree.map(lambda p: p.sharding, subject.params)
    )
    assert len(lines) == reads
    assert lines[-1] == f"load {sharded} {reads}/{reads}"


# Errors.

NAME = "model.layers.1.mlp.up_proj.weight"


def damaged(directory: Path, change: str) -> str:
    """Changes a model of many shards; returns the expected part of the error message."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = directory / index["weight_map"][NAME]
    match change:
        case "a shard is missing":
            file.unlink()
            return f"{file}: no such file"
        case "a shard is truncated":
            os.truncate(file, file.stat().st_size - 100)
            return f"{file}: not a readable safetensors file"
        case "a shard is no safetensors":
            file.write_bytes(b"<html>404</html>" * 100)
            return f"{file}: not a readable safetensors file"
        case "a tensor is not where the index says":
            tensors = load_file(file)
            save_file({k: v for k, v in tensors.items() if k != NAME}, file)
            return f"{file}: tensor {NAME} is missing, which the index says it has"
        case "the index lacks a tensor":
            for name in [k for k, v in index["weight_map"].items() if v == file.name]:
                del index["weight_map"][name]
            path.write_text(json.dumps(index))
            return "is missing"
        case "the index is cut":
            path.write_text(path.read_text()[:-50])
        case "the index is another":
            path.write_text('["a"]')
        case "the index names no files":
            path.write_text('{"weight_map": {"a": 3}}')
    return f"{path}: not an index of safetensors files"


@pytest.mark.parametrize(
    "change",
    [
        "a shard is missing",
        "a shard is truncated",
        "a shard is no safetensors",
        "a tensor is not where the index says",
        "the index lacks a tensor",
        "the index is cut",
        "the index is another",
        "the index names no files",
    ],
)
def test_damaged_shards_are_refused(sharded, tmp_path, change):
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    message = damaged(tmp_path, change)
    config = families.read_config(tmp_path)
    with pytest.raises(UserError) as error:  # before anything is read
        weights.check_weights(tmp_path, config, families.get_abstract_params(config)[0])
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError) as again:
        load(tmp_path, (1, 1, 1))
    assert str(again.value) == str(error.value)
