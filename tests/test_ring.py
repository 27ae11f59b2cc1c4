"""Attention over a ring of devices: every option, against one device with all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import raptax
from raptax import ALiBi, Causal, SlidingWindow, attention, ring_attention
from raptax.kernels.cpu.library import available

B, H, K, T, S, D, E = 2, 4, 2, 8, 12, 8, 5
KERNELS = [*(["native"] if available() else []), "blockwise", "reference"]


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def int32(x) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def ids(length: int) -> jax.Array:
    return int32(np.arange(length)[None] // 5 + np.array([[0], [1]]))


ROWS = P(None, None, "s")
WHOLE = dict.fromkeys(["slopes", "sinks", "scale", "query_lengths", "key_lengths"], P())
DROPPED = dict(dropout_rng=jax.random.key(7), dropout_rate=0.25, deterministic=False)


def block_mask():
    return raptax.create_block_mask(SlidingWindow(5), seq_q=T, seq_kv=S, block=(4, 4))


# Fixed options, and arrays with how they are spread.
OPTIONS = {
    "none": ({}, {}),
    "window": (dict(mask_mod=SlidingWindow(5)), {}),
    "block mask": (dict(mask_mod=block_mask()), {}),
    "function": (
        dict(
            mask_mod=lambda b, h, i, j: (i + j + h) % 3 != 0,
            score_mod=lambda s, b, h, i, j: s + jnp.sin(j.astype(s.dtype)),
        ),
        {},
    ),
    "alibi": (dict(mask_mod=Causal()), dict(slopes=(numbers(H), P()))),
    "mask": ({}, dict(mask=(numbers(B, 1, T, S) > 0, ROWS))),
    "key mask": ({}, dict(mask=(numbers(B, 1, 1, S) > 0, P()))),
    "bias": (dict(mask_mod=Causal()), dict(bias=(numbers(1, H, T, S), ROWS))),
    "key bias": ({}, dict(bias=(numbers(H, 1, S), P()))),
    "row bias": (dict(mask_mod=Causal()), dict(bias=(numbers(B, 1, T, 1), ROWS))),
    "sinks": (dict(mask_mod=SlidingWindow(3)), dict(sinks=(numbers(H), P()))),
    "scale": ({}, dict(scale=(jnp.float32(0.7), P()))),
    "ids": (
        dict(mask_mod=Causal()),
        dict(q_ids=(ids(T), P(None, "s")), k_ids=(ids(S), P(None, "s"))),
    ),
    "lengths": (
        dict(mask_mod=Causal()),
        dict(query_lengths=(int32([8, 3]), P()), key_lengths=(int32([7, 12]), P())),
    ),
    "start": (dict(mask_mod=Causal(), query_start=int32([2, 4])), {}),
    "dropout": (DROPPED | dict(mask_mod=Causal()), {}),
    "dropout, sinks": (
        DROPPED | dict(mask_mod=SlidingWindow(3)),
        dict(sinks=(numbers(H), P())),
    ),
}


def qkv() -> tuple[jax.Array, ...]:
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, E)
    return tuple(numbers(*shape, seed=n) for n, shape in enumerate(shapes))


def gradients(attend, name, kernel):
    """Of a function of query, key, value and the option's arrays, with its value."""

    def loss(floats, others):
        q, k, v, arrays = *floats[:3], floats[3] | others
        options = dict(OPTIONS[name][0])
        if "slopes" in arrays:
            options["score_mod"] = ALiBi(arrays.pop("slopes"))
        if "q_ids" in arrays:
            options["segment_ids"] = arrays.pop("q_ids"), arrays.pop("k_ids")
        options |= arrays
        out, lse = attend(q, k, v, return_lse=True, kernel=kernel, **options)
        seen = jnp.where(jnp.isneginf(lse), 0, lse)
        return jnp.sin(out).sum() + (seen**2).sum(), (out, lse)

    return jax.value_and_grad(loss, has_aux=True)


def arguments(name):
    arrays = {key: x for key, (x, _) in OPTIONS[name][1].items()}
    floats = {k: x for k, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    others = {k: x for k, x in arrays.items() if k not in floats}
    return (*qkv(), floats), others


def on_ring(name, kernel, kind, devices=2):
    """Gradients inside shard_map, with ``check_vma``, in reach of the mesh."""
    mesh = jax.make_mesh((devices,), ("s",), axis_types=(kind,))
    floats, others = arguments(name)
    specs = {key: spec for key, (_, spec) in OPTIONS[name][1].items()}
    in_specs = (
        (ROWS, ROWS, ROWS, {k: specs[k] for k in floats[3]}),
        {k: specs[k] for k in others},
    )
    attend = lambda *x, **options: ring_attention(*x, axis_name="s", **options)

    def step(*arrays):
        (value, outs), found = gradients(attend, name, kernel)(*arrays)
        return (jax.lax.psum(value, "s"), outs), found

    with jax.set_mesh(mesh):
        given = jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s)),
            (floats, others),
            in_specs,
        )
        out_specs = (P(), (ROWS, ROWS)), in_specs[0]
        run = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        return jax.jit(run)(*given)


def cases():
    kinds = AxisType.Auto, AxisType.Explicit
    for i, name in enumerate(OPTIONS):
        for j, kernel in enumerate(KERNELS):
            for kind in kinds:
                quick = j == i % 2 and kind == kinds[i // 2 % 2]
                yield pytest.param(
                    name,
                    kernel,
                    kind,
                    marks=[] if quick else [pytest.mark.slow],
                    id=f"{name}-{kernel}-{kind.name}",
                )


@pytest.mark.parametrize(("name", "kernel", "kind"), list(cases()))
def test_every_option_is_as_on_one_device(name, kernel, kind):
    expected = jax.jit(gradients(attention, name, "reference"))(*arguments(name))
    actual = on_ring(name, kernel, kind)
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_sizes_are_those_of_the_whole_sequence(unchecked):
    mesh = jax.make_mesh((2,), ("s",), axis_types=(AxisType.Auto,))

    def attend(**options):
        ring = lambda *x: ring_attention(*x, axis_name="s", **options)
        jax.shard_map(ring, mesh=mesh, in_specs=(ROWS,) * 3, out_specs=ROWS)(*qkv())

    attend(key_lengths=int32([12, 7]))
    for options, words in (
        (dict(bias=numbers(1, 1, 1, S // 2)), r"= \(2, 4, 4, 12\)"),
        (dict(mask=numbers(1, 1, T, S) > 0), r"= \(2, 4, 4, 12\)"),
        (dict(key_lengths=int32([13, 1])), "must lie between 0 and 12"),
        (dict(sinks=numbers(3)), "one number for each of 4 query heads"),
        (dict(segment_ids=ids(T)), r"must be \(2, 4\) and \(2, 6\)"),
        (dict(dropout_rate=0.5, deterministic=False), "needs a dropout_rng"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(**options)
