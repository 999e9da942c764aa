"""Tests the streamed head against a naive one: values, gradients and memory, for every
divergence."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import xlogy

from distill.objectives import chunks
from distill.objectives.divergences import TOP_STATS, Divergence
from distill.runtime import mesh as mesh_lib
from tests.support.heads import token_stats

B, T, D, E, V = 3, 10, 16, 24, 57


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 6)
    return {
        "hidden": jax.random.normal(keys[0], (B, T, D)),
        "head": jax.random.normal(keys[1], (V, D)),
        "targets": jax.random.randint(keys[2], (B, T), 0, V),
        "teacher_hidden": jax.random.normal(keys[3], (B, T, E)),
        "teacher_head": jax.random.normal(keys[4], (V, E)) * 0.5,
        "weights": jax.random.uniform(keys[5], (5, B, T)),
    }


def naive(hidden, head, targets, teacher_hidden, teacher_head):
    """Computes the definitions with all logits at once."""
    logp = jax.nn.log_softmax(hidden @ head.T)
    logq = jax.nn.log_softmax(teacher_hidden @ teacher_head.T)
    p = jnp.exp(logp)
    index = targets[..., None]
    return {
        "logp": jnp.take_along_axis(logp, index, -1)[..., 0],
        "entropy": -(p * logp).sum(-1),
        "divergence": (p * (logp - logq)).sum(-1),
        "teacher_logp": jax.lax.stop_gradient(jnp.take_along_axis(logq, index, -1)[..., 0]),
        "teacher_entropy": jax.lax.stop_gradient(-(jnp.exp(logq) * logq).sum(-1)),
    }


# MiB of logits that give chunks of 10 (all), 4 (with padding: 3 chunks), and 1 token per row
@pytest.mark.parametrize("chunk", [10, 4, 1])
def test_streamed_equals_naive(arrays, chunk):
    a = arrays
    mib = chunk * 4 * B * V / 2**20
    names = ("logp", "entropy", "divergence", "teacher_logp", "teacher_entropy")

    def total(f, hidden, head):
        stats = f(hidden, head)
        kept = {n: stats[n] for n in names}
        return sum((stats[n] * w).sum() for n, w in zip(names, a["weights"], strict=True)), kept

    def streamed(hidden, head):
        teacher = a["teacher_hidden"], a["teacher_head"]
        return token_stats(
            hidden, head, a["targets"], *teacher, loss_chunk_mib=mib, divergence=Divergence()
        )

    def plain(hidden, head):
        return naive(hidden, head, a["targets"], a["teacher_hidden"], a["teacher_head"])

    results = [
        jax.jit(jax.value_and_grad(lambda h, w, f=f: total(f, h, w), (0, 1), has_aux=True))(
            a["hidden"], a["head"]
        )
        for f in (streamed, plain)
    ]
    for ours, reference in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def masked(a, mask, summed, hidden=None, **options):
    """Returns (weighted sum, stats) and gradients of the hidden states and the head, in chunks of
    at most six tokens."""
    weight = a["weights"][0] * (1 if mask is None else mask)

    def total(hidden, head):
        student, teacher = (hidden, head, a["targets"]), (a["teacher_hidden"], a["teacher_head"])
        arguments: Any = {
            "loss_chunk_mib": 6 * 4 * V / 2**20,
            "divergence": Divergence(),
            **options,
        }
        if summed:
            loss = {"loss": lambda stats, known: {"loss": stats["divergence"] * known["by"]}}
            arguments |= {**loss, "known": {"by": a["weights"][1]}, "weight_BT": weight}
        stats = token_stats(*student, *teacher, mask_BT=mask, **arguments)
        each = stats["divergence"] * a["weights"][1]
        return stats.pop("total") if summed else jnp.sum(each * weight), stats

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    return run(a["hidden"] if hidden is None else hidden, a["head"])


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("shards", [(1, 1), (3, 1), (1, 2), (3, 5)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_only_needed_tokens_have_values_and_gradients(arrays, shards, summed, share):
    """Equals a run over all tokens where a token is needed, and is 0 elsewhere; rows hold prompts
    and responses of several sequences."""
    mask = jnp.asarray(np.random.default_rng(0).random((B, T)) < share)
    (value, stats), grads = masked(arrays, mask, summed, shards=shards)
    whole = {**arrays, "weights": arrays["weights"].at[0].multiply(mask)}
    (expected, every), slopes = masked(whole, None, summed)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name, x in every.items():
        np.testing.assert_allclose(stats[name], jnp.where(mask, x, 0), rtol=1e-6, atol=1e-6)
    for x, y in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("summed", [False, True])
def test_unneeded_tokens_skip_the_heads(arrays, summed):
    """When needed tokens fill whole chunks, nothing else is read: a NaN elsewhere reaches neither
    the values nor the head's gradient, not even multiplied by zero."""
    mask = np.zeros((B, T), bool)
    mask[0, 3:], mask[2, 5:] = True, True  # 12 tokens: two chunks of six
    hidden = jnp.where(mask[..., None], arrays["hidden"], jnp.nan)
    (value, stats), grads = masked(arrays, jnp.asarray(mask), summed, hidden)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in (*stats.values(), *grads))
    mask[1, 0] = True  # a third chunk, mostly of unneeded tokens
    (value, _), _ = masked(arrays, jnp.asarray(mask), summed, hidden)
    assert not np.isfinite(value)


def test_chunks_are_small_enough_to_skip_some(arrays, monkeypatch):
    """Applies even when all logits fit at once, unless chunks would be too small to be worth it."""
    mask = jnp.zeros((B, T), bool).at[:, :1].set(True)
    for least, count in ((3, 10), (30, 1)):
        monkeypatch.setattr(chunks, "_MIN_CHUNK_TOKENS", least)
        cut, runs, _ = chunks.split_into_chunks({"x": arrays["targets"]}, B * T, mask, (1, 1))
        assert runs is not None and int(runs.sum()) == 1
        assert cut["x"].shape[0] == count


def test_needed_tokens_on_a_mesh_equal_one_device(arrays):
    """Rows, tokens and vocabulary are split over eight devices; each token keeps its place."""
    keys = jax.random.split(jax.random.key(3), 4)
    hidden, head = jax.random.normal(keys[0], (4, 16, D)), jax.random.normal(keys[1], (64, D))
    targets = jax.random.randint(keys[2], (4, 16), 0, 64)
    mask = jax.random.bernoulli(keys[3], 0.3, (4, 16))

    def run(**options):
        def total(hidden, head):
            stats = token_stats(
                hidden, head, targets, loss_chunk_mib=8 * 4 * 64 / 2**20, mask_BT=mask,
                loss=lambda stats, _: {"loss": stats["logp"]}, known={},
                weight_BT=mask.astype(jnp.float32), **options,
            )  # fmt: skip
            return stats.pop("total"), stats

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))

    want = run()(hidden, head)
    mesh = mesh_lib.make_mesh(1, 2, 2, context=2)
    with mesh_lib.use_mesh(mesh):
        assert mesh_lib.count_shards(4, 16) == (2, 4)
        lying = jax.sharding.NamedSharding(mesh, mesh_lib.make_hidden_spec(mesh, 16))
        spread = run(split=mesh_lib.split_vocabulary, shards=mesh_lib.count_shards(4, 16))
        got = spread(jax.device_put(hidden, lying), head)
    for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_stats_without_a_teacher(arrays):
    a = arrays
    stats = token_stats(a["hidden"], a["head"], a["targets"], loss_chunk_mib=1)
    assert set(stats) == {"logp", "entropy"}


FORMS = {
    "reverse": Divergence("reverse"),
    "forward": Divergence("forward"),
    **{f"jsd {beta}": Divergence("jsd", beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)},
    "skewed reverse": Divergence("reverse", skew=0.1),
    "skewed forward": Divergence("forward", skew=0.3),
}
TAU = [dataclasses.replace(d, temperature=t) for d in FORMS.values() for t in (0.5, 1.0, 2.0)]


def formula(logits, teacher_logits, d):
    """Computes each divergence as its paper writes it, without numerical care, and sums it."""
    p = jax.nn.softmax(logits / d.temperature)
    q = jax.nn.softmax(teacher_logits / d.temperature)

    def kl(a, b):
        return (xlogy(a, a) - xlogy(a, b)).sum(-1)

    def value():
        if d.divergence_type == "jsd" and 0 < d.beta < 1:
            m = d.beta * q + (1 - d.beta) * p
            return d.beta * kl(q, m) + (1 - d.beta) * kl(p, m)
        if d.divergence_type == "forward" or (d.divergence_type, d.beta) == ("jsd", 0):
            return kl(q, d.skew * q + (1 - d.skew) * p)
        return kl(p, d.skew * p + (1 - d.skew) * q)

    return d.temperature**2 * value()


def compare(d, logits, teacher_logits, **options):
    """Returns token_stats of given logits: the heads are identities."""
    eye = jnp.eye(logits.shape[-1], dtype=logits.dtype)
    targets = jnp.zeros(logits.shape[:2], jnp.int32)
    student, teacher = (logits, eye, targets), (teacher_logits, eye)
    return token_stats(*student, *teacher, loss_chunk_mib=1, divergence=d, **options)


@functools.cache
def pair(size=8, scale=2.0):
    rng = np.random.default_rng(3)
    return tuple(scale * rng.normal(size=(2, 5, size)) for _ in range(2))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("d", TAU, ids=str)
def test_exact_equals_autodiff_of_the_formula(d, x64):
    logits, teacher_logits = map(jnp.asarray, pair())

    def ours(x):
        return compare(d, x, teacher_logits)["divergence"]

    def theirs(x):
        return formula(x, teacher_logits, d)

    np.testing.assert_allclose(ours(logits), theirs(logits), atol=1e-12)
    grads = [jax.grad(lambda x, f=f: f(x).sum())(logits) for f in (ours, theirs)]
    np.testing.assert_allclose(*grads, atol=1e-12)


@pytest.mark.parametrize("d", FORMS.values(), ids=str)
def test_exact_gradients_in_float32_are_accurate_and_finite(d):
    """The error is 1e-6 without float64, and gradients are finite where the distributions barely
    overlap."""
    logits, teacher_logits = (jnp.asarray(x, jnp.float32) for x in pair())
    ours = compare(d, logits, teacher_logits)["divergence"]
    np.testing.assert_allclose(ours, formula(logits, teacher_logits, d), atol=2e-6)
    far = jnp.asarray(pair()[0] * 200, jnp.float32)
    for x, y in ((far, teacher_logits), (teacher_logits, far), (far, -far)):
        value, grad = jax.value_and_grad(lambda x, y=y: compare(d, x, y)["divergence"].sum())(x)
        assert jnp.isfinite(value) and value > 0
        # A divergence from a mixture is bounded: for distributions that share nothing, its exact
        # gradient is too small for float32 to tell from zero.
        mixture = d.skew > 0 or (d.divergence_type == "jsd" and 0 < d.beta < 1)
        assert jnp.isfinite(grad).all() and (grad.any() or mixture)


def test_jsd_beta_has_trls_convention(x64):
    """β=0 is exactly KL(T‖S) and β=1 exactly KL(S‖T); some papers swap the ends."""
    logits, teacher_logits = map(jnp.asarray, pair())

    def value(d):
        return np.asarray(compare(d, logits, teacher_logits)["divergence"])

    np.testing.assert_array_equal(value(Divergence("jsd", 0.0)), value(Divergence("forward")))
    np.testing.assert_array_equal(value(Divergence("jsd", 1.0)), value(Divergence("reverse")))
    assert (np.abs(value(Divergence("forward")) - value(Divergence("reverse"))) > 0.01).any()
    near = value(Divergence("jsd", 1e-7)) / 1e-7
    np.testing.assert_allclose(near, value(Divergence("forward")), rtol=1e-3)


def test_high_temperature_keeps_the_gradient_size(x64):
    """With the factor τ², the gradient tends to that of half the squared distance of the centred
    logits over V at high temperature, not to zero."""
    logits, teacher_logits = map(jnp.asarray, pair())

    def grad(t):
        d = Divergence("reverse", temperature=t)
        return jax.grad(lambda x: compare(d, x, teacher_logits)["divergence"].sum())(logits)

    gap = logits - teacher_logits
    limit = (gap - gap.mean(-1, keepdims=True)) / gap.shape[-1]
    np.testing.assert_allclose(grad(1e6), limit, atol=1e-5)


TOPS = [
    dataclasses.replace(d, k=3, topk_from=of)
    for d in (*FORMS.values(), Divergence("forward", temperature=2.0))
    for of in ("teacher", "student", "union")
]


def coarse(d, logits, teacher_logits):
    """Computes the formula on the k tokens and the tail, one position at a time, and sums it."""
    choices = {"teacher": [teacher_logits], "student": [logits], "union": [teacher_logits, logits]}
    tops = [np.argsort(-np.asarray(x))[..., : d.k] for x in choices[d.topk_from]]

    def value(x):
        p, q = (jax.nn.softmax(y / d.temperature) for y in (x, teacher_logits))
        total = jnp.zeros(())
        for place in np.ndindex(*x.shape[:2]):
            kept = np.unique(np.concatenate([ids[place] for ids in tops]))
            ends = [jnp.append(y[place][kept], 1 - y[place][kept].sum()) for y in (p, q)]
            plain = dataclasses.replace(d, temperature=1.0)
            total += formula(jnp.log(ends[0]), jnp.log(ends[1]), plain)
        return d.temperature**2 * total

    return jax.value_and_grad(value)(logits)


@pytest.mark.parametrize("d", TOPS, ids=str)
def test_topk_equals_autodiff_of_the_coarse_formula(d, x64):
    logits, teacher_logits = (jnp.asarray(x[:1, :2]) for x in pair())
    ours = jax.value_and_grad(lambda x: compare(d, x, teacher_logits)["divergence"].sum())(logits)
    for a, b in zip(ours, coarse(d, logits, teacher_logits), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("of", ["teacher", "student", "union"])
def test_topk_with_tail_is_never_negative_and_tends_to_exact(kind, of):
    """It grows with k, as a finer partition of outcomes must, and is exact for k = V."""
    logits, teacher_logits = (jnp.asarray(x, jnp.float32) for x in pair())
    d = Divergence(kind)
    forms = [dataclasses.replace(d, k=k, topk_from=of) for k in (1, 2, 5, 8)] + [d]
    values = np.stack([compare(x, logits, teacher_logits)["divergence"] for x in forms])
    assert (values >= 0).all()
    assert (values[-1] - values[:-1] >= -1e-6).all()
    if of != "union":  # the set of k + 1 contains that of k
        assert (np.diff(values, axis=0) >= -1e-6).all()
    np.testing.assert_allclose(values[-2], values[-1], atol=1e-6)


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_stored_topk_equals_the_teachers_topk(kind, k):
    """Stored log-probabilities give the same value and gradient as the teacher, whatever else is
    stored."""
    logits, teacher_logits = (jnp.asarray(x, jnp.float32) for x in pair())
    logq, ids = jax.lax.top_k(jax.nn.log_softmax(teacher_logits), 8)
    d, eye = Divergence(kind, k=k), jnp.eye(8)

    def stored(x, keep):
        targets = jnp.zeros(x.shape[:2], jnp.int32)
        top = ids[..., :keep], logq[..., :keep]
        options: Any = {"divergence": d, "teacher_top_BTK": top, "overlap_k": keep}
        return token_stats(x, eye, targets, loss_chunk_mib=1, **options)

    results = [
        jax.value_and_grad(lambda x, f=f: f(x)["divergence"].sum())(logits)
        for f in (
            lambda x: compare(d, x, teacher_logits),
            lambda x: stored(x, k),
            lambda x: stored(x, 8),
        )
    ]
    for ours in results[1:]:
        for a, b in zip(ours, results[0], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)
    names = {"logp", "entropy", "divergence", "top_overlap", "outside_top", *TOP_STATS}
    stats = stored(logits, k)
    assert set(stats) == names
    np.testing.assert_array_equal(stats["teacher_top_ids"], ids[..., :k])
    np.testing.assert_array_equal(stats["teacher_top_logp"], logq[..., :k])


def without_tail(d, logits, teacher_logits):
    """The known-bad form: Σ over the teacher's k tokens of probabilities that do not sum to 1."""
    logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher_logits)
    ids = jax.lax.top_k(logq, d.k)[1]
    logp, logq = (jnp.take_along_axis(x, ids, -1) for x in (logp, logq))
    return (jnp.exp(logp) * (logp - logq)).sum(-1)


def test_topk_without_tail_leaks_mass():
    """It is not a divergence: it is negative once mass has left the k tokens, so descent drives
    mass out. With the tail, descent ends at the teacher."""
    d = Divergence("reverse", k=2)
    teacher_logits = jnp.asarray([[[3.0, 2.0, 0.0, 0.0, 0.0]]])
    start = jnp.zeros((1, 1, 5))

    def descend(loss):
        x = start
        step = jax.jit(jax.grad(lambda x: loss(x).sum()))
        for _ in range(500):
            x = x - 0.5 * step(x)
        return x, float(loss(x)[0, 0]), float(jax.nn.softmax(x)[..., :2].sum())

    _, bad, kept = descend(lambda x: without_tail(d, x, teacher_logits))
    x, good, ours = descend(lambda x: compare(d, x, teacher_logits)["divergence"])
    at_teacher = float(jax.nn.softmax(teacher_logits)[..., :2].sum())
    assert bad < -0.2 and kept < 0.5 < at_teacher  # at its minimum half of the mass is lost
    assert -1e-6 < good < 1e-4 and abs(ours - at_teacher) < 0.01
    two = jax.nn.softmax(x)[0, 0, :2] / ours
    np.testing.assert_allclose(two, jax.nn.softmax(teacher_logits[0, 0, :2]), atol=0.01)


@pytest.mark.parametrize("d", [*FORMS.values(), *TOPS], ids=str)
def test_equal_teacher_and_student_have_zero_loss_and_gradient(arrays, d):
    """There is not even rounding noise, which Adam would scale up."""
    a = arrays

    def loss(hidden, head):
        student = jax.lax.stop_gradient((hidden, head))
        stats = token_stats(hidden, head, a["targets"], *student, loss_chunk_mib=1, divergence=d)
        return stats["divergence"].sum()

    value, grads = jax.value_and_grad(loss, (0, 1))(a["hidden"], a["head"])
    assert value == 0
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_stored_topk_of_the_student_has_zero_loss_up_to_rounding(arrays, kind):
    """The mass of a stored tail is 1 - Σ, so zero is only reached up to rounding."""
    a = arrays
    logits = a["hidden"] @ a["head"].T
    logq, ids = jax.lax.top_k(jax.nn.log_softmax(logits), 5)

    def loss(x):
        options: Any = {"divergence": Divergence(kind, k=5), "teacher_top_BTK": (ids, logq)}
        return token_stats(x, jnp.eye(V), a["targets"], loss_chunk_mib=1, **options)[
            "divergence"
        ].sum()

    value, grad = jax.value_and_grad(loss)(logits)
    assert abs(value) < 1e-6 * B * T
    assert jnp.abs(grad).max() < 1e-6


def test_padded_vocabulary_ids_count_in_both_softmaxes():
    """Ids that no tokenizer uses (151,669 and up of 151,936) are outcomes like any other: the loss
    sees mass that the student puts on them and pushes it back."""
    targets = jnp.zeros((1, 1), jnp.int32)
    teacher = jnp.array([[[2.0, 1.0, -9.0, -9.0]]])

    def loss(own):
        stats = token_stats(
            own, jnp.eye(4), targets, teacher, jnp.eye(4), loss_chunk_mib=1, divergence=Divergence()
        )
        return stats["divergence"].sum()

    leaking = teacher.at[..., 2:].add(9.0)  # the same over the real ids
    value, slope = jax.value_and_grad(loss)(leaking)
    assert value > 1
    assert (slope[0, 0, 2:] > 0).all() and (slope[0, 0, :2] < 0).all()


def test_teacher_gets_no_gradient(arrays):
    a = arrays

    def loss(teacher_hidden, teacher_head, logq):
        total = 0.0
        for d in (Divergence(), Divergence("jsd"), Divergence("jsd", k=4, topk_from="union")):
            options: Any = {"loss_chunk_mib": 1, "divergence": d, "overlap_k": 3}
            head = a["hidden"], a["head"], a["targets"]
            stats = token_stats(*head, teacher_hidden, teacher_head, **options)
            total += sum(x.sum() for x in stats.values())
        ids = jnp.broadcast_to(jnp.arange(4), logq.shape)
        options = {"divergence": Divergence(k=4), "teacher_top_BTK": (ids, logq)}
        stats = token_stats(*head, loss_chunk_mib=1, **options)
        return total + stats["divergence"].sum()

    logq = jnp.full((B, T, 4), -2.0)
    grads = jax.grad(loss, (0, 1, 2))(a["teacher_hidden"], a["teacher_head"], logq)
    assert all(not g.any() for g in grads)


def test_diagnostics_match_their_definitions(arrays):
    """Checks the overlap, the mass outside the top-k, and the exact value reported beside a top-k
    form."""
    a = arrays
    k = 7
    student = a["hidden"], a["head"], a["targets"]
    teacher = a["teacher_hidden"], a["teacher_head"]
    d = Divergence("forward", k=k)
    options: Any = {"divergence": d, "overlap_k": k, "top_k": k}
    stats = token_stats(*student, *teacher, loss_chunk_mib=1e-3, **options)
    exactly: Any = {"divergence": dataclasses.replace(d, k=0)}
    exact_stats = token_stats(*student, *teacher, loss_chunk_mib=1e-3, **exactly)
    p, q = (np.asarray(jax.nn.softmax(x @ w.T)) for x, w in (student[:2], teacher))
    ours, theirs = (np.argsort(-x, -1)[..., :k] for x in (p, q))
    np.testing.assert_array_equal(stats["top_ids"], ours)
    for name, likeliest, x in (("student", ours, p), ("teacher", theirs, q)):
        np.testing.assert_array_equal(stats[f"{name}_top_ids"], likeliest)
        logp = np.log(np.take_along_axis(x, likeliest, -1))
        np.testing.assert_allclose(stats[f"{name}_top_logp"], logp, rtol=1e-5)
    for place in np.ndindex(B, T):
        shared = set(ours[place]) & set(theirs[place])
        np.testing.assert_allclose(stats["top_overlap"][place], len(shared) / k, rtol=1e-6)
        outside = 1 - p[place][theirs[place]].sum()
        np.testing.assert_allclose(stats["outside_top"][place], outside, atol=1e-6)
    exact = (q * np.log(q / p)).sum(-1)
    np.testing.assert_allclose(exact_stats["divergence"], exact, rtol=1e-4)
    np.testing.assert_allclose(stats["reverse_kl"], (p * np.log(p / q)).sum(-1), rtol=1e-4)
    assert (stats["divergence"] < exact_stats["divergence"]).all()

    def diagnostics(hidden):
        stats = token_stats(hidden, *student[1:], *teacher, loss_chunk_mib=1e-3, **options)
        return sum(stats[n].sum() for n in stats.keys() - {"logp", "entropy", "divergence"} - TOP)

    assert not jax.grad(diagnostics)(a["hidden"]).any()


TOP = {"top_ids", "top_logp", *TOP_STATS}


@pytest.mark.parametrize(
    "d",
    [Divergence("jsd"), Divergence("reverse", temperature=2.0, k=5, topk_from="union")],
    ids=str,
)
def test_vocabulary_split_over_devices_equals_one_device(d):
    """Splits logits over eight devices, with top-k, its mask and stored top-k included."""
    rng = np.random.default_rng(7)
    shapes = ((2, 6, D), (64, D), (2, 6, E), (64, E))
    hidden, head, *teacher = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    targets = jnp.asarray(rng.integers(0, 64, (2, 6)))
    logq, ids = jax.lax.top_k(jax.nn.log_softmax(teacher[0] @ teacher[1].T), 6)
    stored = dataclasses.replace(d, k=5, topk_from="teacher", temperature=1.0)

    def loss(hidden, head, split):
        options: Any = {"loss_chunk_mib": 2 * 3 * 64 * 4 / 2**20, "split": split, "overlap_k": 4}
        compared: Any = {"divergence": d, "baseline": True}
        stats = token_stats(hidden, head, targets, *teacher, **options, **compared)
        exact: Any = {"divergence": dataclasses.replace(d, k=0)}
        exactly = token_stats(hidden, head, targets, *teacher, **options, **exact)
        known: Any = {"divergence": stored, "teacher_top_BTK": (ids, logq)}
        top = token_stats(hidden, head, targets, **options, **known)
        return stats["divergence"].sum() + top["divergence"].sum(), (stats, exactly, top)

    def run(split):
        graded = jax.value_and_grad(lambda h, w: loss(h, w, split), (0, 1), has_aux=True)
        return jax.jit(graded)(hidden, head)

    plain = run(lambda logits: logits)
    with mesh_lib.use_mesh(mesh_lib.make_mesh(1, 4, 2)):
        spread = run(mesh_lib.split_vocabulary)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_bfloat16_is_summed_in_float32(arrays):
    """Hidden states in bfloat16 give float32 stats, and a float32 head has a float32 gradient."""
    a = arrays
    hidden, teacher = (a[name].astype(jnp.bfloat16) for name in ("hidden", "teacher_hidden"))

    def loss(head):
        options: Any = {"divergence": Divergence("jsd", k=3), "overlap_k": 3}
        student = hidden, head, a["targets"]
        stats = token_stats(*student, teacher, a["teacher_head"], loss_chunk_mib=1, **options)
        options["divergence"] = Divergence("jsd")
        exactly = token_stats(*student, teacher, a["teacher_head"], loss_chunk_mib=1, **options)
        numbers = [x for name, x in stats.items() if not name.endswith("_ids")]
        assert all(x.dtype == jnp.float32 for x in (*numbers, exactly["divergence"]))
        return stats["logp"].sum() + stats["divergence"].sum()

    assert jax.grad(loss)(a["head"]).dtype == jnp.float32


def test_bfloat16_gradients_have_one_rounding_error(arrays):
    """Over several chunks the error is that of rounding one factor, 2^-9, not that of a bfloat16
    sum; it is zero if the teacher is the student."""
    a = arrays
    low = {name: a[name].astype(jnp.bfloat16) for name in ("hidden", "teacher_hidden")}
    d, mib = Divergence(), 4 * 4 * B * V / 2**20

    def grads(f, hidden, head):
        return jax.jit(jax.grad(lambda h, w: f(h, w)["divergence"].sum(), (0, 1)))(hidden, head)

    def streamed(hidden, head, teacher=(low["teacher_hidden"], a["teacher_head"])):
        return token_stats(hidden, head, a["targets"], *teacher, loss_chunk_mib=mib, divergence=d)

    def plain(hidden, head):
        heads = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (head, a["teacher_head"]))
        of, by = heads
        return naive(hidden, of, a["targets"], low["teacher_hidden"].astype(jnp.float32), by)

    ours = grads(streamed, low["hidden"], a["head"])
    assert [x.dtype for x in ours] == [jnp.bfloat16, jnp.float32]
    for x, y in zip(ours, grads(plain, low["hidden"].astype(jnp.float32), a["head"]), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.linalg.norm(x - y) < 2**-8 * np.linalg.norm(y)
    same = functools.partial(streamed, teacher=(low["hidden"], a["head"]))
    assert not any(np.any(x) for x in grads(same, low["hidden"], a["head"]))


@pytest.mark.parametrize(
    "d", [Divergence(), Divergence("jsd", temperature=2.0, k=16, topk_from="union")], ids=str
)
def test_streamed_loss_needs_under_a_tenth_of_the_memory(d):
    """Uses 8,192 tokens and the real vocabulary, against the naive loss."""
    tokens, vocabulary, width, teacher_width = 8192, 151_936, 256, 320
    f32 = jnp.float32
    shapes = (
        jax.ShapeDtypeStruct((1, tokens, width), f32),
        jax.ShapeDtypeStruct((vocabulary, width), f32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens, teacher_width), f32),
        jax.ShapeDtypeStruct((vocabulary, teacher_width), f32),
    )

    def streamed(*args):
        return token_stats(*args, loss_chunk_mib=128, divergence=d)["divergence"].sum()

    def plain(*args):
        return naive(*args)["divergence"].sum()

    def peak(f):
        compiled = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    ours, reference = peak(streamed), peak(plain)
    print(f"streamed {ours / 2**30:.2f} GiB, naive {reference / 2**30:.2f} GiB")
    assert ours < reference / 10
