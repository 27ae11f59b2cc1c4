"""The C++ kernels: every instruction set of this machine, and what is theirs alone.

That they compute attention, and its derivatives, the tests of all kernels show. Those run
with the best instruction set; here each computes problems of the shared table, in a
process of its own, as it is chosen once for all.
"""

import concurrent.futures
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import raptax
from raptax import Causal, Documents, SlidingWindow, SoftCap, Unsupported, Window
from raptax.kernels import reference_attention
from raptax.kernels.cpu import library as native
from raptax.kernels.cpu.forward import (
    UNLIMITED,
    native_attention,
    native_unsupported_reason,
    split_band,
)
from tests.instruction_sets import INSTRUCTION_SETS
from tests.problems import PROBLEMS, Problem

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the native library was not built"
)

QUICK = ("causal tiles", "more queries", "documents", "alibi", "bias", "value size")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def outputs(attend, problem: Problem, dtype) -> list[np.ndarray]:
    q, k, v = problem.arrays(dtype)
    out = jax.jit(functools.partial(attend, **problem.kwargs()))(q, k, v)
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(out)]


def exact(q, k, v, **kwargs):
    return reference_attention(*(x.astype(jnp.float32) for x in (q, k, v)), **kwargs)


@functools.cache
def expected(name: str, dtype) -> list[np.ndarray]:
    """In float32, from inputs that have been rounded to ``dtype``."""
    return outputs(exact, PROBLEMS[name], dtype)


def compute(isa: str, names: tuple[str, ...], to: Path) -> dict[str, np.ndarray]:
    """Outputs of these problems by one instruction set; skips if it does not run here."""
    script = f"from tests.test_native import write; write({names!r}, {str(to)!r})"
    root = Path(__file__).parents[1]
    env = os.environ | dict(RAPTAX_ISA=isa, PYTHONPATH=str(root), JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=env,
        cwd=root,
        capture_output=True,
        text=True,
    )
    if "RAPTAX_ISA names nothing that runs here" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr
    return dict(np.load(to))


def write(names: tuple[str, ...], to: str) -> None:
    """Runs in the process that `compute` starts."""
    found = {}
    for name in names:
        for dtype in DTYPES:
            arrays = outputs(native_attention, PROBLEMS[name], dtype)
            found |= {f"{name}/{jnp.dtype(dtype)}/{n}": x for n, x in enumerate(arrays)}
    np.savez(to, **found)


def check(found: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
    """Within rounding of the output, and for weights of bfloat16 within theirs."""
    for name in names:
        for dtype in DTYPES:
            for n, e in enumerate(expected(name, dtype)):
                a = found[f"{name}/{jnp.dtype(dtype)}/{n}"]
                unit = float(jnp.finfo(dtype).eps)
                tolerance = max(1e-5, unit) * PROBLEMS[name].scale_of_logits
                np.testing.assert_allclose(
                    a, e, rtol=tolerance, atol=tolerance, err_msg=name
                )


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa, tmp_path):
    check(compute(isa, QUICK, tmp_path / "out.npz"), QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_on_every_problem(isa, tmp_path):
    names = tuple(PROBLEMS)
    check(compute(isa, names, tmp_path / "out.npz"), names)


# ----------------------------------------------------------------- numbers that are not


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: jnp.dtype(x).name)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_shows_to_those_who_see_it(dtype, bad):
    """In a key or value that queries from 90 on see, and in a query."""
    q, k, v = Problem("bad", B=1, H=2, K=1, T=150, S=150).arrays(dtype)
    attend = functools.partial(native_attention, mask_mod=Causal())
    clean = attend(q, k, v)
    for poisoned in (
        attend(q, k.at[0, 0, 90, 3].set(bad), v),
        attend(q, k, v.at[0, 0, 90, 3].set(bad)),
    ):
        np.testing.assert_array_equal(poisoned[:, :, :90], clean[:, :, :90])
        assert jnp.isnan(poisoned[:, :, 90:]).all()
    out = attend(q.at[0, 1, 7, 0].set(bad), k, v)
    lost = np.isnan(out).all(-1)
    assert lost[0, 1, 7]
    assert lost.sum() == 1
    none = dict(mask=jnp.zeros((1, 1, 1, 1), bool))
    assert (native_attention(q.at[0, 1, 7, 0].set(bad), k, v, **none) == 0).all()


@pytest.mark.parametrize(("T", "D"), [(40, 8), (100, 40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: jnp.dtype(x).name)
def test_a_maximum_that_keeps_growing(dtype, T, D):
    """The output so far is scaled down again and again: scores rise from key to key."""
    S = 1000
    q = jnp.ones((1, 1, T, D), dtype)
    k = jnp.linspace(-20, 40, S)[None, None, :, None] * jnp.ones((1, 1, S, D))
    k = k * (8 / D) ** 0.5
    v = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, S, 4)), dtype)
    k = k.astype(dtype)
    options = dict(mask_mod=Causal(), return_lse=True)
    out, lse = native_attention(q, k, v, **options)
    wanted, wanted_lse = exact(q, k, v, **options)
    # Scores of a hundred are some 1e-5 apart in float32, those of the definition too.
    tolerance = max(3e-5, float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(
        out.astype(jnp.float32), wanted, rtol=0, atol=2 * tolerance
    )
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


# ------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda x: jnp.dtype(x).name)
def test_a_row_does_not_depend_on_its_batch(dtype):
    problem = Problem("batch", B=3, H=4, K=2, T=300, S=300)
    q, k, v = problem.arrays(dtype)
    attend = functools.partial(native_attention, mask_mod=Causal(), return_lse=True)
    together = attend(q, k, v)
    for a, b in zip(together, attend(q, k, v), strict=True):
        np.testing.assert_array_equal(a, b)
    for b in range(3):
        alone = attend(*(x[b : b + 1] for x in (q, k, v)))
        for a, e in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], e[b])


def test_threads_of_python_do_not_disturb_one_another():
    problem = PROBLEMS["causal tiles"]
    arrays = problem.arrays(jnp.float32)
    attend = jax.jit(functools.partial(native_attention, **problem.kwargs()))
    alone = np.asarray(attend(*arrays))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for out in pool.map(lambda _: np.asarray(attend(*arrays)), range(40)):
            np.testing.assert_array_equal(out, alone)


@pytest.mark.parametrize("T", [3, 70])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keys_that_are_too_many_to_pack_at_once(dtype, T):
    """Beyond 26 MB of keys and values each task packs for itself."""
    S, D = 14000 * 4 // jnp.dtype(dtype).itemsize, 256
    assert S * 2 * D * jnp.dtype(dtype).itemsize > 26 << 20
    q, k, v = Problem("long", B=1, H=1, K=1, T=T, S=S, D=D, E=D).arrays(dtype)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    np.testing.assert_allclose(
        native_attention(q, k, v, mask_mod=Causal()).astype(jnp.float32),
        reference_attention(*exact, mask_mod=Causal()),
        rtol=0,
        atol=2e-6 if dtype == jnp.float32 else 1e-3,
    )


def test_float32_is_float32():
    """Where it is computed by parts, as on AMX, nothing is lost, nor large numbers."""
    arrays = Problem("long", H=2, K=2, T=300, S=300, D=64, E=64).arrays(jnp.float32)
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in arrays)
        exact = np.asarray(reference_attention(*wide, mask_mod=Causal()))
    error = np.abs(native_attention(*arrays, mask_mod=Causal()) - exact).max()
    plain = np.abs(reference_attention(*arrays, mask_mod=Causal()) - exact).max()
    assert error <= 2 * plain
    q, k, v = arrays
    large = v.at[:, :, 0].set(3.4e38)  # the largest bfloat16 number is smaller
    out = native_attention(q, k, large, mask_mod=Causal())
    np.testing.assert_allclose(out[:, :, 0], large[:, :, 0], rtol=1e-6)


# -------------------------------------------------------------------------- through JAX


def attend_window(q, k, v):
    return native_attention(q, k, v, mask_mod=SlidingWindow(20), score_mod=SoftCap(3.0))


def test_transformations():
    """Derivatives are tested with all kernels."""
    q, k, v = Problem("transformed", B=2, H=2, K=1, T=33, S=40).arrays(jnp.float32)
    wanted = attend_window(q, k, v)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    stacked = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    mapped = jax.vmap(attend_window)(*stacked)
    close(mapped[0], wanted)
    close(mapped[1], attend_window(*(2 * x for x in (q, k, v))))
    scanned = jax.lax.scan(lambda c, x: (c, attend_window(*x)), 0, tuple(stacked))[1]
    close(scanned, mapped)
    close(jax.lax.cond(q.sum() > -1e9, attend_window, lambda q, *_: q, q, k, v), wanted)
    close(jax.checkpoint(attend_window)(q, k, v), wanted)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        attend_window, mesh=mesh, in_specs=(P("x"),) * 3, out_specs=P("x")
    )
    close(jax.jit(sharded)(q, k, v), wanted)


def test_export():
    problem = Problem("exported", T=20, S=20)
    q, k, v = problem.arrays(jnp.float32)
    allowed = [jax.export.DisabledSafetyCheck.custom_call("raptax_forward")]
    exported = jax.export.export(jax.jit(attend_window), disabled_checks=allowed)(
        q, k, v
    )
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(q, k, v), jax.jit(attend_window)(q, k, v))


# ------------------------------------------------------------------------ what it takes


def test_bands():
    ids = Documents(jnp.zeros((1, 4), jnp.int32))
    for mask, band in (
        (None, (UNLIMITED, UNLIMITED, None)),
        (Causal(), (UNLIMITED, 0, None)),
        (SlidingWindow(5), (4, 0, None)),
        (Window(3, None), (3, UNLIMITED, None)),
        (Window(3, 2) & Causal(), (3, 0, None)),
        (Causal() & SlidingWindow(7) & SlidingWindow(5), (4, 0, None)),
        (Window(3, dilation=2), (UNLIMITED, UNLIMITED, Window(3, dilation=2))),
        (ids & Causal(), (UNLIMITED, 0, ids)),
        (ids & Causal() & ids, (UNLIMITED, 0, ids & ids)),
        (~Causal(), (UNLIMITED, UNLIMITED, ~Causal())),
    ):
        assert split_band(mask) == band


def test_what_it_declines(monkeypatch):
    q, k, v = Problem("declined").arrays(jnp.float32)
    assert native_unsupported_reason(q, k, v) is None
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (q, k, v)]
        assert "float64 asks for more" in native_unsupported_reason(*wide)
    sort = lambda s, b, h, i, j: jnp.sort(s, axis=-1)
    assert native_unsupported_reason(q, k, v, score_mod=sort).startswith(
        "its score_mod "
    )
    with pytest.raises(Unsupported, match="native cannot run this: its score_mod "):
        native_attention(q, k, v, score_mod=sort)
    module = sys.modules[
        native_unsupported_reason.__module__
    ]  # its name is that of a function too
    monkeypatch.setattr(module, "missing_reason", lambda: "no")
    assert native_unsupported_reason(q, k, v) == "no"
    with pytest.raises(Unsupported, match="native cannot run this: no"):
        native_attention(q, k, v)


def test_a_block_mask_decides_which_tiles_are_worked_on():
    """Tiles that it calls empty are not looked at, whatever its mask says."""
    q, k, v = Problem("tiles", B=1, T=256, S=256).arrays(jnp.float32)
    mask = raptax.create_block_mask(~Causal(), seq_q=256, seq_kv=256)
    wanted = reference_attention(q, k, v, mask_mod=~Causal())
    np.testing.assert_allclose(
        native_attention(q, k, v, mask_mod=mask), wanted, rtol=0, atol=2e-6
    )
    nothing = raptax.BlockMask(
        jnp.zeros_like(mask.kinds),
        mask.mask_mod,
        mask.query_start,
        mask.block,
        mask.lengths,
    )
    assert (native_attention(q, k, v, mask_mod=nothing) == 0).all()


# ---------------------------------------------------------------------------------- vmap


def mapped_options(p: Problem) -> dict[str, tuple[dict, tuple[str, ...]]]:
    """Options, and the names of those that are mapped."""
    starts = jnp.array([0, 3, 5], jnp.int32)
    bias = jnp.asarray(p.random(3, p.B, p.H, 1, p.S), jnp.float32)
    ids = jnp.asarray(np.arange(p.S)[None] // 9 + np.zeros((p.B, 1)), jnp.int32)
    return {
        "window and cap": (
            dict(mask_mod=SlidingWindow(5), score_mod=raptax.SoftCap(3.0)),
            (),
        ),
        "own starts": (dict(query_start=starts, mask_mod=Causal()), ("query_start",)),
        "own bias": (dict(bias=bias), ("bias",)),
        "shared mask": (dict(mask=bias[0, :1, :1] > 0), ()),
        "shared ids": (dict(segment_ids=ids), ()),
        "dropout": (
            dict(dropout_rng=jax.random.key(0), dropout_rate=0.3, deterministic=False),
            (),
        ),
    }


@pytest.mark.parametrize("name", mapped_options(Problem("mapped")))
def test_vmap_is_a_call_for_each(name):
    """Folded into the axis of sequences, or one after another where that is wrong."""
    p = Problem("mapped", B=2, H=2, K=1, T=33, S=33)
    options, mapped = mapped_options(p)[name]
    q, k, _ = (jnp.stack([x, 2 * x, -x]) for x in p.arrays(jnp.float32))
    v = p.arrays(jnp.float32)[2]
    along = {key: options[key] for key in mapped}
    shared = {key: x for key, x in options.items() if key not in mapped}

    def both(q, k, v, along):
        call = lambda *x: raptax.attention(*x, kernel="native", **shared, **along)
        out, pull = jax.vjp(call, q, k, v)
        return out, pull(jnp.sin(out))

    actual = jax.vmap(both, in_axes=(0, 0, None, 0))(q, k, v, along)
    for n in range(3):
        expected = both(q[n], k[n], v, jax.tree.map(lambda x, n=n: x[n], along))
        for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_allclose(a[n], e, rtol=0, atol=1e-6)


def test_vmap_of_what_treats_sequences_alike_is_one_call():
    x = jnp.ones((3, 2, 2, 9, 4))
    one = jax.vmap(lambda x: raptax.attention(x, x, x, kernel="native"))
    assert " while(" not in jax.jit(one).lower(x).compile().as_text()
    ids = jnp.zeros((2, 9), jnp.int32)  # read by the number of a sequence
    several = jax.vmap(
        lambda x: raptax.attention(x, x, x, kernel="native", segment_ids=ids)
    )
    assert " while(" in jax.jit(several).lower(x).compile().as_text()
