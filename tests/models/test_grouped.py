"""Tests products of grouped rows, and their gradients from every kernel, against a loop over
groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import grouped, grouped_gpu

# rows, in, out, sizes: groups may be empty, end inside a tile of rows, and leave rows over.
CASES = {
    "even": (24, 16, 8, (8, 8, 8)),
    "uneven, rows left over": (37, 12, 20, (5, 0, 17, 1, 3)),
    "all in one": (300, 8, 8, (0, 300, 0)),
    "several tiles": (530, 24, 40, (200, 0, 129, 201)),
    "none": (16, 8, 8, (0, 0)),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request):
    M, D, F, sizes = CASES[request.param]
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(M, D)), rng.normal(size=(M, F))
    kernel = rng.normal(size=(len(sizes), D, F))
    return *(a.astype(np.float32) for a in (x, dy, kernel)), np.array(sizes, np.int32)


def groups(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def test_product_and_gradients_equal_a_loop_over_groups(case):
    """Rows beyond the last group have no gradient when masked as the experts mask them."""
    x, dy, kernel, sizes = case
    here = (np.arange(len(x)) < sizes.sum())[:, None]

    def product(x, kernel):
        return jnp.where(here, grouped.dot(jnp.where(here, x, 0), kernel, sizes), 0)

    y, transpose = jax.vjp(product, x, kernel)
    dx, dkernel = transpose(dy)
    expected = [np.zeros_like(dy), np.zeros_like(x), np.zeros_like(kernel)]
    for e, of_group in enumerate(groups(sizes)):
        expected[0][of_group] = x[of_group] @ kernel[e]
        expected[1][of_group] = dy[of_group] @ kernel[e].T
        expected[2][e] = x[of_group].T @ dy[of_group]
    for ours, theirs in zip((y, dx, dkernel), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_tpu_kernel_gradient_equals_a_loop_over_groups(case):
    x, dy, kernel, sizes = case
    gradient = grouped.compute_kernel_gradient(
        jnp.asarray(x), jnp.asarray(dy), jnp.asarray(sizes), interpret=True
    )
    assert gradient.shape == kernel.shape
    for e, of_group in enumerate(groups(sizes)):
        np.testing.assert_allclose(gradient[e], x[of_group].T @ dy[of_group], atol=1e-4)


def test_gpu_kernels_equal_a_loop_over_groups(case):
    """Rows of a tile that belong to another group, or to none, do not enter the sums."""
    x, dy, kernel, sizes = (jnp.asarray(a) for a in case)
    y = grouped_gpu.multiply_groups(x, kernel, sizes, interpret=True)
    dx = grouped_gpu.multiply_groups(dy, kernel, sizes, transposed=True, interpret=True)
    dkernel = grouped_gpu.compute_kernel_gradient(x, dy, sizes, interpret=True)
    assert y.shape == dy.shape and dx.shape == x.shape and dkernel.shape == kernel.shape
    for e, of_group in enumerate(groups(case[3])):
        np.testing.assert_allclose(y[of_group], x[of_group] @ kernel[e], atol=1e-4)
        np.testing.assert_allclose(dx[of_group], dy[of_group] @ kernel[e].T, atol=1e-4)
        np.testing.assert_allclose(dkernel[e], x[of_group].T @ dy[of_group], atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_gpu_kernel_reads_8_bit_weights(kind):
    """Uses an odd width, so that the last tile of each axis is only partly filled."""
    rng, sizes = np.random.default_rng(1), np.array([3, 0, 20, 9], np.int32)
    x = jnp.asarray(rng.normal(size=(32, 144)), jnp.bfloat16)
    kernel = jnp.asarray(rng.integers(-8, 8, size=(4, 144, 130)), kind)
    y = grouped_gpu.multiply_groups(
        x, kernel, jnp.asarray(sizes), dtype=jnp.float32, interpret=True
    )
    assert y.dtype == jnp.float32
    wide, wide_x = np.asarray(kernel.astype(jnp.float32)), np.asarray(x.astype(jnp.float32))
    for e, of_group in enumerate(groups(sizes)):
        np.testing.assert_allclose(y[of_group], wide_x[of_group] @ wide[e], rtol=1e-5, atol=1e-4)
