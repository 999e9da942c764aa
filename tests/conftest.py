"""Strict settings for every test: eight CPU devices, no network, no silent broadcasting."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

# Before jax or a Hugging Face library is imported; child processes inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
# What is compiled again (each run builds its own functions) comes from a cache made anew for every
# invocation of pytest: results must not depend on earlier ones.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Most of the time goes into compiling small programs that run once: LLVM need not try hard.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A device that waits for others in a collective holds a thread of XLA's: with fewer threads than
# devices may hold, all wait for ever. See distill.runtime.cli.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("OMP_NUM_THREADS", "2")  # torch, beside eight XLA devices

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.support.paths import DATA

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")

# Fusions are made to run fast, and take longer to compile. Only while XLA reads its flags, with the
# first look for devices: TPU's compiler, which reads them later, ends a process over one that it
# does not know.
with pytest.MonkeyPatch.context() as patch:
    if jax.__version_info__ < (0, 11):  # later ones do not know it either, and end
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false")
    jax.devices()

# Tracing makes objects by the million: looking for cycles at every 700 of them, and through all
# imported modules each time, took a tenth of the tests' time.
gc.set_threshold(20_000, 20, 20)

# What these assert is shown in full, as what tests assert themselves is.
ASSERTING = ("answers", "evaluations", "recipes")
pytest.register_assert_rewrite(*(f"tests.support.{name}" for name in ASSERTING))


def pytest_collection_finish() -> None:
    gc.freeze()  # by now the tests' modules have imported everything


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Half a surrogate pair in a report, from hostile input, would end the whole run: UTF-8, in
    which workers report, has none."""
    report = yield
    report.sections = [(title, _escape(text)) for title, text in report.sections]
    if report.longrepr is not None and (text := str(report.longrepr)) != _escape(text):
        report.longrepr = _escape(text)
    return report


def _escape(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """Frees a module's compiled programs. Each takes some memory mappings, of which Linux lets a
    process have 65,530: with all programs of the suite in one process, XLA's compiler ends in a
    segmentation fault when it is given no more."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that may lie beside the project; skips where it does not."""
    if not DATA.is_dir():
        pytest.skip("no ../shared/data beside the project")
    return DATA


@pytest.fixture(scope="module")
def compiled_anew():
    """A program for devices that are not there is written to the persistent cache, but cannot be
    read from it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
