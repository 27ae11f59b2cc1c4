"""Gradients in C++: every instruction set of this machine, and what is theirs alone.

That they are the gradients of attention, the tests of all kernels show. Those run with
the best instruction set; here each works on a few problems, in a process of its own, as
it is chosen once for all.
"""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import ALiBi, Causal, SlidingWindow, alibi_slopes, attention
from raptax.kernels.cpu import library as native
from raptax.kernels.cpu.forward import native_attention
from tests.instruction_sets import INSTRUCTION_SETS
from tests.problems import PROBLEMS, Problem
from tests.test_kernels import expected, run

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the native library was not built"
)

CASES = (
    ("more queries", jnp.float32),
    ("alibi", jnp.float32),
    ("sinks", jnp.float32),
    ("dropout", jnp.float32),
    ("odd sizes", jnp.float32),
    ("causal tiles", jnp.bfloat16),
    ("odd sizes", jnp.bfloat16),
    ("causal tiles", jnp.float16),
)


def in_another_process(call: str, to: Path, **env: str) -> dict[str, np.ndarray]:
    """What ``call``, a function of this file, writes there; skips if it cannot run."""
    root = Path(__file__).parents[1]
    script = f"from tests import test_native_backward as t; t.{call}({str(to)!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | dict(PYTHONPATH=str(root), JAX_PLATFORMS="cpu") | env,
        cwd=root,
        capture_output=True,
        text=True,
    )
    if "RAPTAX_ISA names nothing that runs here" in done.stderr:
        pytest.skip("this machine does not have these instructions")
    assert done.returncode == 0, done.stderr
    return dict(np.load(to))


def write_cases(to: str) -> None:
    found = {}
    for name, dtype in CASES:
        arrays = run(native_attention, PROBLEMS[name], dtype)
        found |= {f"{name}/{jnp.dtype(dtype)}/{n}": x for n, x in enumerate(arrays)}
    np.savez(to, **found)


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa, tmp_path):
    found = in_another_process("write_cases", tmp_path / "found.npz", RAPTAX_ISA=isa)
    for name, dtype in CASES:
        unit = max(1e-5, 3 * float(jnp.finfo(dtype).eps))
        for n, e in enumerate(expected(PROBLEMS[name], dtype)):
            a = found[f"{name}/{jnp.dtype(dtype)}/{n}"]
            size = max(1.0, np.abs(e[np.isfinite(e)]).max(initial=0))
            np.testing.assert_allclose(
                a, e, rtol=0, atol=unit * size, err_msg=f"{name} {n}"
            )


def gradients(problem: Problem, dtype, **options):
    """Of query, key and value, and of ``bias`` if that is among the options."""
    q, k, v = problem.arrays(dtype)
    learned = {name: options.pop(name) for name in ("bias",) if name in options}

    def loss(q, k, v, learned):
        out = native_attention(q, k, v, **learned, **options)
        return (out * problem.cotangent(dtype)).sum().astype(jnp.float32)

    found = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, learned)
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(found)]


def assert_same(actual, wanted) -> None:
    for a, w in zip(actual, wanted, strict=True):
        np.testing.assert_array_equal(a, w)


MANY_BLOCKS = Problem("many blocks", B=2, H=4, K=2, T=600, S=700, D=40, E=24)


def shared_by_all(dtype):
    """Gradients to which every block of every head and sequence adds."""
    bias = jnp.asarray(MANY_BLOCKS.random(1, 1, 600, 700, seed=8), jnp.float32)
    return gradients(MANY_BLOCKS, dtype, mask_mod=Causal(), bias=bias)


def write_shared(to: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        arrays = shared_by_all(dtype)
        found |= {f"{jnp.dtype(dtype)}/{n}": x for n, x in enumerate(arrays)}
    np.savez(to, **found)


def test_neither_threads_nor_repetition_change_a_bit(tmp_path):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not let a process choose its processors")
    alone = in_another_process("write_shared", tmp_path / "found.npz")
    for dtype in (jnp.float32, jnp.bfloat16):
        wanted = [alone[f"{jnp.dtype(dtype)}/{n}"] for n in range(4)]
        for _ in range(3):
            assert_same(shared_by_all(dtype), wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_sequence_does_not_notice_the_batch(dtype):
    problem = Problem("batch", B=3, H=2, K=1, T=300, S=300, D=64, E=64)
    q, k, v = problem.arrays(dtype)
    attend = functools.partial(native_attention, mask_mod=SlidingWindow(100))
    loss = lambda q, k, v: (attend(q, k, v) ** 2).sum().astype(jnp.float32)
    pull = jax.grad(loss, (0, 1, 2))
    for x, alone in zip(pull(q, k, v), pull(q[1:2], k[1:2], v[1:2]), strict=True):
        np.testing.assert_array_equal(x[1:2], alone)


def test_a_pass_for_queries_alone_gives_the_same_bits():
    """With 48 heads to a group, the sums of dQ would take too much memory."""
    problem = Problem("large group", B=1, H=48, K=1, T=1030, S=40, D=128, E=8)
    q, k, v = problem.arrays(jnp.bfloat16)
    pull = jax.jit(jax.grad(lambda q: (native_attention(q, k, v) ** 2).sum()))
    assert 48 * 1030 * 128 * 4 > 24 * 2**20 > 24 * 1030 * 128 * 4
    halves = [pull(q[:, :24]), pull(q[:, 24:])]
    np.testing.assert_array_equal(pull(q), jnp.concatenate(halves, axis=1))


BROADCASTS = list(itertools.product((0, 1), repeat=4))


@pytest.mark.parametrize("axes", BROADCASTS, ids=lambda axes: "".join(map(str, axes)))
def test_a_bias_that_serves_many_gets_the_sum(axes):
    problem = Problem("broadcast bias", T=130, S=200)
    full = (problem.B, problem.H, problem.T, problem.S)
    shape = tuple(n if axis else 1 for n, axis in zip(full, axes, strict=True))
    bias = jnp.asarray(problem.random(*shape, seed=8), jnp.float32)
    options = dict(mask_mod=SlidingWindow(50))
    *_, found = gradients(problem, jnp.float32, bias=bias, **options)
    spread = jnp.broadcast_to(bias, full)
    *_, each = gradients(problem, jnp.float32, bias=spread, **options)
    over = tuple(n for n, axis in enumerate(axes) if not axis)
    wanted = each.astype(np.float64).sum(over, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(each).sum())


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_that_no_query_sees_reaches_no_gradient(bad):
    problem = Problem("unseen", B=1, T=300, S=500, D=64, E=64)
    q, k, v = problem.arrays(jnp.bfloat16)
    loss = lambda q, k, v: native_attention(
        q, k, v, mask_mod=Causal(), query_start=0
    ).sum()
    pull = jax.jit(jax.grad(loss, (0, 1, 2)))
    worse = (x.at[:, :, 300:].set(bad) for x in (k, v))
    assert_same(pull(q, *worse), pull(q, k, v))


def test_a_query_that_is_not_finite_makes_its_gradients_nan():
    q, k, v = Problem("bad query", B=1, H=1, K=1).arrays(jnp.float32)
    loss = lambda q, k, v: native_attention(q, k, v, mask_mod=Causal()).sum()
    d_q, d_k, d_v = jax.grad(loss, (0, 1, 2))(q.at[0, 0, 40, 3].set(jnp.nan), k, v)
    assert np.isnan(d_q[0, 0, 40]).all()
    assert np.isfinite(np.delete(d_q[0, 0], 40, axis=0)).all()
    assert np.isnan(d_k[0, 0, :41]).all()
    assert np.isnan(d_v[0, 0, :41]).all()
    assert np.isfinite(d_k[0, 0, 41:]).all()


def test_what_a_mod_learns_costs_nothing_unless_asked_for():
    """`blockwise` finds those gradients, in loops that only then are in the program."""
    problem = Problem("learned", T=64, S=64)
    q, k, v = problem.arrays(jnp.float32)

    def loss(q, slopes):
        return native_attention(q, k, v, score_mod=ALiBi(slopes)).sum()

    def compiled(wanted):
        pull = jax.jit(jax.grad(loss, wanted))
        return pull.lower(q, alibi_slopes(problem.H)).compile().as_text()

    assert "while" not in compiled(0)
    assert "while" in compiled(1)


def test_a_window_that_starts_inside_a_step_is_masked():
    """The last query stands alone in its block, and sees a part of 32 columns."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, 1, 257, 16)), jnp.bfloat16) for _ in range(3)
    )

    def gradients(kernel):
        attend = functools.partial(attention, mask_mod=SlidingWindow(50), kernel=kernel)
        return jax.grad(lambda *x: attend(*x)[:, :, 256:].sum(), (0, 1, 2))(q, k, v)

    for mine, wanted in zip(gradients("native"), gradients("blockwise"), strict=True):
        mine, wanted = (np.asarray(x, np.float32) for x in (mine, wanted))
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-2)
