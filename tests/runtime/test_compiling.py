"""Tests that a thread is known to compile while it does, and only then."""

import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from distill.runtime import compiling


@pytest.fixture(autouse=True)
def watched() -> None:
    compiling.start_watching(jax.monitoring)


def note(seen: list[bool]) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that notes, where it is traced, whether its thread compiles."""

    def double(x: jax.Array) -> jax.Array:
        seen.append(compiling.is_compiling(threading.get_ident()))
        return 2 * x

    return double


def test_a_thread_compiles_while_it_traces() -> None:
    seen: list[bool] = []
    here = threading.get_ident()
    assert not compiling.is_compiling(here)
    lowered = jax.jit(note(seen)).lower(jnp.ones(3))
    assert seen == [True] and not compiling.is_compiling(here)
    lowered.compile()
    assert not compiling.is_compiling(here)


def test_a_program_within_another_ends_alone() -> None:
    seen: list[bool] = []
    inner = jax.jit(note(seen))

    def outer(x: jax.Array) -> jax.Array:
        x = inner(x)
        return note(seen)(x)

    jax.jit(outer)(jnp.ones(3))
    assert seen == [True, True] and not compiling.is_compiling(threading.get_ident())


def test_a_function_that_cannot_be_traced_ends_too() -> None:
    def fail(x: jax.Array) -> jax.Array:
        raise ValueError("no such program")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such program"):
            jax.jit(fail)(jnp.ones(3))
        assert not compiling.is_compiling(threading.get_ident())


def test_threads_are_told_apart() -> None:
    """One waits in XLA's place while another looks at both."""
    begun, looked = threading.Event(), threading.Event()

    def wait(x: jax.Array) -> jax.Array:
        begun.set()
        assert looked.wait(20)
        return x

    thread = threading.Thread(target=lambda: jax.jit(wait)(jnp.ones(3)))
    thread.start()
    assert begun.wait(20) and thread.ident
    try:
        assert compiling.is_compiling(thread.ident)
        assert not compiling.is_compiling(threading.get_ident())
    finally:
        looked.set()
        thread.join()
    assert not compiling.is_compiling(thread.ident)
