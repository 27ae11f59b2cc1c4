"""Every transformation of JAX, over every kernel and everything attention may be asked.

The reference kernel on whole arrays says what is expected. In the quick suite each
transformation meets one kernel and one option, with heads and dtypes in turn; in the slow
part, every kernel and half of the options.
"""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from raptax import (
    ALiBi,
    Causal,
    RelativeBias,
    SlidingWindow,
    SoftCap,
    Unsupported,
    alibi_slopes,
    attention,
)
from raptax.kernels.cpu.library import available

SIZES = dict(b=4, h=4, t=12, s=20, d=8, e=8, n=7)
KERNELS = [*(["native"] if available() else []), "blockwise"]
KV_HEADS = dict(mha=4, gqa=2, mqa=1)
DTYPES = dict(float32=jnp.float32, bfloat16=jnp.bfloat16)
AXES = dict(q="bhtd", k="bksd", v="bkse")
"""Axes of arrays, a letter each; 1 is an axis of one entry."""


def weighted(w, d):
    """Plain functions that capture a learned array and one that is not."""
    return dict(
        mask_mod=lambda b, h, i, j: (i + j) % d["period"][b] != 0,
        score_mod=lambda s, b, h, i, j: s * w["factor"][h].astype(s.dtype),
    )


@dataclasses.dataclass(frozen=True)
class Option:
    """What attention is asked for, of arrays that are learned and others."""

    kwargs: Any
    learned: dict[str, str] = dataclasses.field(default_factory=dict)
    others: dict[str, str] = dataclasses.field(default_factory=dict)


OPTIONS = {
    "none": Option(lambda w, d: {}),
    "causal": Option(lambda w, d: dict(mask_mod=Causal())),
    "window": Option(lambda w, d: dict(mask_mod=SlidingWindow(5))),
    "function": Option(weighted, dict(factor="h"), dict(period="b")),
    "alibi": Option(
        lambda w, d: dict(mask_mod=Causal(), score_mod=ALiBi(w["slopes"])),
        dict(slopes="h"),
    ),
    "relative": Option(
        lambda w, d: dict(score_mod=RelativeBias(w["table"])), dict(table="hn")
    ),
    "soft cap": Option(lambda w, d: dict(mask_mod=Causal(), score_mod=SoftCap(2.0))),
    "scale": Option(lambda w, d: dict(scale=w["scale"]), dict(scale="")),
    "bias": Option(lambda w, d: dict(bias=w["bias"]), dict(bias="1h1s")),
    "sinks": Option(
        lambda w, d: dict(mask_mod=SlidingWindow(4), sinks=w["sinks"]), dict(sinks="h")
    ),
    "segments": Option(
        lambda w, d: dict(segment_ids=(d["q_ids"], d["k_ids"])),
        others=dict(q_ids="bt", k_ids="bs"),
    ),
    "lengths": Option(
        lambda w, d: dict(mask_mod=Causal(), key_lengths=d["lengths"]),
        others=dict(lengths="b"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel, an option, the number of kv heads and a dtype."""

    kernel: str
    option: str
    heads: str
    dtype: str

    @property
    def sizes(self) -> dict[str, Any]:
        return SIZES | dict(k=KV_HEADS[self.heads])

    @property
    def axes(self) -> tuple[Any, ...]:
        """Of query, key, value, learned arrays and others."""
        option = OPTIONS[self.option]
        return *AXES.values(), option.learned, option.others

    def arrays(self, *lead: int) -> tuple[Any, ...]:
        """Query, key, value, learned arrays and others, with axes in front."""
        rng = np.random.default_rng(len(self.option))

        def make(name: str, axes: str) -> jax.Array:
            shape = tuple(1 if a == "1" else self.sizes[a] for a in axes)
            whole = dict(
                period=2 + np.arange(SIZES["b"]) % 3,
                q_ids=np.arange(SIZES["t"])[None] // 5 + np.arange(SIZES["b"])[:, None],
                k_ids=np.arange(SIZES["s"])[None] // 6 + np.zeros((SIZES["b"], 1)),
                lengths=np.array([20, 0, 13, 17]),
            )
            if name in whole:
                x = np.broadcast_to(whole[name], (*lead, *shape))
                return jnp.asarray(x, jnp.int32)
            x = rng.normal(size=(*lead, *shape))
            if name == "slopes":
                x = x / 8 + np.asarray(alibi_slopes(SIZES["h"]))
            return jnp.asarray(x, jnp.float32).astype(DTYPES[self.dtype])

        return map_axes(make, self.axes)

    def attend(self, q, k, v, w, d):
        options = OPTIONS[self.option].kwargs(w, d)
        return attention(q, k, v, kernel=self.kernel, **options)

    def loss(self, *arrays: Any) -> jax.Array:
        return jnp.sin(self.attend(*arrays).astype(jnp.float32)).sum()


def map_axes(f: Any, axes: Any) -> tuple[Any, ...]:
    """``f(name, axes)`` for query, key, value, and the arrays in two dictionaries."""
    *qkv, learned, others = axes
    return (
        *(f(name, a) for name, a in zip("qkv", qkv, strict=True)),
        {name: f(name, a) for name, a in learned.items()},
        {name: f(name, a) for name, a in others.items()},
    )


# ----------------------------------------------------------------------- transformations

LEARNED = 0, 1, 2, 3  # of the arguments


def reverse(case, arrays):
    return jax.value_and_grad(case.loss, LEARNED)(*arrays)


def along(f, arrays):
    """The derivative of ``f`` in the direction of its own arguments, bent."""
    *moved, d = arrays
    moved = tuple(moved)
    directions = jax.tree.map(lambda x: jnp.cos(3 * x), moved)
    return jax.jvp(lambda *x: f(*x, d), moved, directions)[1]


def forward(case, arrays):
    return along(case.attend, arrays)


def forward_of_reverse(case, arrays):
    return along(jax.grad(case.loss, LEARNED), arrays)


def rematerialised(case, arrays):
    return jax.grad(jax.checkpoint(case.loss), LEARNED)(*arrays)


def mapped(case, arrays):
    *learned, d = arrays
    step = lambda *x: jax.value_and_grad(case.loss, LEARNED)(*x, d)
    return jax.vmap(step)(*(jax.tree.map(lambda x: jnp.stack([x, -x]), learned)))


def mapped_twice(case, arrays):
    """Queries along one axis, keys along the other, the rest for all of them."""
    q, k, *rest = arrays
    inner = jax.vmap(case.attend, (None, 0, None, None, None))
    outer = jax.vmap(inner, (0, None, None, None, None))
    loss = lambda q, k, v, w, d: jnp.sin(outer(q, k, v, w, d).astype(jnp.float32)).sum()
    two = jnp.stack([q, 2 * q]), jnp.stack([k, -k])
    return jax.value_and_grad(loss, LEARNED)(*two, *rest)


def scanned(case, arrays):
    def loss(q, k, v, w, d):
        step = lambda q, x: (q + case.attend(q, *x, w, d), None)
        keys = jnp.stack([k, -k]), jnp.stack([v, 2 * v])
        return jax.lax.scan(step, q, keys)[0].astype(jnp.float32).sum()

    return jax.grad(loss, LEARNED)(*arrays)


ALONE = dict(
    reverse=reverse,
    forward=forward,
    hvp=forward_of_reverse,
    remat=rematerialised,
    vmap=mapped,
    vmap_twice=mapped_twice,
    scan=scanned,
)


def close(case, actual, expected):
    """Within rounding, relative to each array's largest entry.

    A scalar's derivative is a sum over all scores, most of which cancels: in bfloat16
    what remains has the rounding errors of all of them.
    """
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        a, e = (np.asarray(x, np.float64) for x in (a, e))
        tolerance = 2e-5 if case.dtype == "float32" else 3e-2 if e.shape else 0.2
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * abs(e).max() + 1e-6)


def expected(case, transform, arrays):
    """What the reference gives on whole arrays, worked out in float32."""
    reference = dataclasses.replace(case, kernel="reference")
    as_float32 = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    wide = jax.tree.map(as_float32, arrays)
    outs = jax.jit(lambda *x: transform(reference, x))(*wide)
    like = jax.eval_shape(lambda *x: transform(reference, x), *arrays)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), outs, like)


def cases(*names: str, kernels: Any = KERNELS) -> list[Any]:
    """``(name, case)``: one kernel and option in the quick suite, more when slow.

    Options, heads and dtypes go round, so that pairs of them meet, and every other option
    meets the next kernel.
    """
    chosen = []
    for name, (j, kernel) in itertools.product(names, enumerate(kernels)):
        m = sum(map(ord, name))
        quick = 7 * m % len(OPTIONS) if j == m % len(kernels) else None
        for i, option in enumerate(OPTIONS):
            if i != quick and (i + j + m) % 2:
                continue
            heads, dtype = list(KV_HEADS)[(i + m) % 3], list(DTYPES)[(i // 2 + m) % 2]
            case = Case(kernel, option, heads, dtype)
            marks = [] if i == quick else [pytest.mark.slow]
            words = "-".join([name, *vars(case).values()])
            chosen.append(pytest.param(name, case, marks=marks, id=words))
    return chosen


@pytest.mark.parametrize(("name", "case"), cases(*ALONE))
def test_on_one_device(name, case):
    arrays, transform = case.arrays(), ALONE[name]
    actual = jax.jit(lambda *x: transform(case, x))(*arrays)
    close(case, actual, expected(case, transform, arrays))


# ------------------------------------------------------------------------------- meshes


def specs(case: Case, where: dict[str, str], whole: tuple[str, ...] = ()) -> Any:
    """Axes whose letters are in ``where`` on its mesh axes, as far as these divide."""

    def spec(name: str, axes: str) -> P:
        if name in whole:
            return P()
        return P(
            *(where.get(a) if case.sizes.get(a, 1) % 2 == 0 else None for a in axes)
        )

    return map_axes(spec, case.axes)


MANUAL = {
    "data": dict(b="x"),
    "heads": dict(h="x", k="x"),
}
KINDS = dict(auto=AxisType.Auto, explicit=AxisType.Explicit)


@pytest.mark.parametrize(
    ("name", "case"), cases(*(f"{m} {k}" for m in MANUAL for k in KINDS))
)
def test_in_shard_map(name, case):
    """Gradients inside, as a training step takes them; what is replicated gets sums."""
    where, kind = name.split()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(KINDS[kind],))
    in_specs = specs(case, MANUAL[where])

    def step(*arrays):
        value, gradients = reverse(case, arrays)
        return jax.lax.psum(value, "x"), gradients

    arrays = case.arrays()
    with jax.set_mesh(mesh):
        shared = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=(P(), in_specs[:4]),
            check_vma=True,
        )
        given = jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), arrays, in_specs
        )
        actual = jax.jit(shared)(*given)
    close(case, actual, expected(case, reverse, arrays))


EXPLICIT = {
    "batch": dict(b="x"),
    "heads": dict(h="y", k="y"),
    "both": dict(b="x", h="y", k="y"),
    "lengths": dict(t="x", s="x"),
}


@pytest.mark.parametrize(("name", "case"), cases(*EXPLICIT))
def test_arrays_of_explicit_meshes(name, case):
    """Plain jit of arrays whose types say how they are sharded."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    arrays = case.arrays()
    looked_up = "factor", "period", "slopes", "table"  # JAX asks how these are gathered
    where = specs(case, EXPLICIT[name], whole=looked_up)
    with jax.set_mesh(mesh):
        given = jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), arrays, where
        )
        actual = jax.jit(lambda *x: reverse(case, x))(*given)
    close(case, actual, expected(case, reverse, arrays))


# ------------------------------------------------------------------------------- export

CALLS = [
    jax.export.DisabledSafetyCheck.custom_call(f"raptax_{name}")
    for name in ("forward", "backward")
]


@pytest.mark.parametrize(("name", "case"), cases("fixed", "symbolic"))
def test_exported(name, case, unchecked):
    """Without the checks of annotations, which know no symbolic sizes."""
    arrays = given = case.arrays()
    if name == "symbolic":
        letters = "bts"
        symbols = jax.export.symbolic_shape(", ".join(letters))
        sizes = case.sizes | dict(zip(letters, symbols, strict=True))
        shape = lambda axes: tuple(1 if a == "1" else sizes[a] for a in axes)
        shapes = map_axes(lambda _, axes: shape(axes), case.axes)
        given = jax.tree.map(
            lambda x, n: jax.ShapeDtypeStruct(n, x.dtype), arrays, shapes
        )
    program = jax.jit(lambda *x: reverse(case, x))
    export = jax.export.export(program, disabled_checks=CALLS)
    if (name, case.kernel) == ("symbolic", "native") and case.axes[-1]:
        with pytest.raises(Unsupported, match="array of symbolic shape"):
            export(*given)
        return
    exported = export(*given)
    if name == "fixed":
        exported = jax.export.deserialize(exported.serialize())
    close(case, exported.call(*arrays), expected(case, reverse, arrays))


@pytest.mark.parametrize(
    ("platform", "case"), cases("tpu", "cuda", kernels=KERNELS[:-1])
)
def test_exported_for_other_platforms(platform, case):
    program = jax.jit(lambda *x: reverse(case, x))
    arrays = case.arrays()
    modules = {
        name: jax.export.export(program, platforms=(name,), disabled_checks=CALLS)(
            *arrays
        ).mlir_module()
        for name in ("cpu", platform)
    }
    calls = {name: re.findall(r"@raptax_\w+", text) for name, text in modules.items()}
    assert calls["cpu"]
    assert not calls[platform]


# ------------------------------------------------------------------- single properties


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_policy_keeps_the_forward_kernel_from_running_twice(kernel):
    """In the compiled program of layers in a scan; blockwise has loops of two tiles."""
    pattern, scans = r'custom_call_target="raptax_forward"', 0
    if kernel == "blockwise":
        pattern, scans = r" while\(", 1
    x = jnp.ones((1, 2, 300, 8))

    def layer(c, _):
        return attention(jnp.sin(c), c, c, mask_mod=Causal(), kernel=kernel), None

    def count(step, transform=lambda f: f):
        stack = lambda q: jax.lax.scan(step, q, None, length=3)[0].sum()
        text = jax.jit(transform(stack)).lower(x).compile().as_text()
        return len(re.findall(pattern, text))

    keep = jax.checkpoint_policies.save_only_these_names("raptax_out", "raptax_lse")
    again, once = (
        count(jax.checkpoint(layer, policy=policy), jax.grad) for policy in (None, keep)
    )
    alone = count(layer) - scans
    assert alone > 0
    assert again - once == alone


@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
def test_no_tracer_leaks(kernel):
    case = Case(kernel, "alibi", "gqa", "float32")
    with jax.checking_leaks():
        actual = reverse(case, case.arrays())
    close(case, actual, expected(case, reverse, case.arrays()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_windows_of_a_vmap_do_not_outlive_it(kernel):
    q, k, v, *_ = Case(kernel, "window", "gqa", "float32").arrays()
    window = lambda n, kernel=kernel: attention(
        q, k, v, mask_mod=SlidingWindow(n), kernel=kernel
    )
    both = jax.vmap(window)(jnp.array([3, 5], jnp.int32))
    for out, n in zip(both, (3, 5), strict=True):
        for later in (n, jnp.int32(n)):
            np.testing.assert_allclose(window(later), out, rtol=0, atol=2e-6)
        np.testing.assert_allclose(window(n, "reference"), out, rtol=0, atol=2e-6)
