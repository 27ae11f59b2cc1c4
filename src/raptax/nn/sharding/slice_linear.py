"""How each kind of projection is cut: which of its outputs or inputs, in which order.

`slice_outputs` and `slice_inputs` are given places ``(parts, n)``: what is made can be
cut into that many equal parts along the axis, with no block or word across two of them.
-1 stands for an output of zero, or for an input that is masked. Nothing is rounded.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...quant import gguf, gptq
from ..linear import CodesLinear, GGUFLinear, Linear
from ..quantized_linear import Float8Linear, GPTQLinear

Index = np.ndarray
"""Whole numbers that say which places to take; -1 for one that is not there."""


@functools.singledispatch
def slice_outputs(projection: Any, rows: Index) -> Any:
    """The projection with these outputs ``(parts, n)``; see the module.

    A new kind of projection registers what that means for it.
    """
    raise ValueError(
        "raptax does not know how to slice the outputs of a "
        f"{type(projection).__name__}; register it with "
        "raptax.nn.sharding.slice_linear.slice_outputs and slice_inputs."
    )


@functools.singledispatch
def slice_inputs(projection: Any, columns: Index) -> Any:
    """The projection for these inputs ``(parts, n)``; see the module."""
    return slice_outputs(
        projection, columns
    )  # which raises, unless it is registered alone


def take(x: Any, index: Index, axis: int) -> Any:
    """``x`` at these places of an axis; zeros where the index is -1."""
    x, index = x[...], index.reshape(-1)  # a Variable's array, or an array itself
    if np.array_equal(index, np.arange(x.shape[axis])):
        return x
    taken = jnp.take(x, np.maximum(index, 0), axis=axis)
    if (index >= 0).all():
        return taken
    shape = [1] * x.ndim
    shape[axis] = -1
    return jnp.where((index >= 0).reshape(shape), taken, jnp.zeros((), x.dtype))


def run_length(index: Index, block: int) -> int:
    """The largest divisor of ``block`` in whose runs each part can be taken.

    A run is that many places in a row, from a multiple of it on, or as many -1.
    """
    for size in range(block, 0, -1):
        if block % size == 0 and index.shape[-1] % size == 0:
            runs = index.reshape(-1, size)
            whole = (runs[:, :1] % size == 0) & (runs == runs[:, :1] + np.arange(size))
            if (whole | (runs == -1)).all(axis=1).all():
                return size
    return 1


def runs(index: Index, size: int) -> Index:
    """Numbers of the runs of ``size`` places that ``index`` consists of."""
    first = index.reshape(-1, size)[:, 0]
    return np.where(first < 0, -1, first // size)


def _bias(projection: Any, rows: Index) -> Any:
    return None if projection.bias is None else take(projection.bias, rows, 0)


def _whole_bias(projection: Any) -> Any:
    return None if projection.bias is None else projection.bias[...]


class MaskedInputs(nnx.Module):
    """A projection that takes some of its inputs for zeros, whatever they are.

    A query head that is not there still sees the keys of its kv head. What it makes must
    not reach the product, nor a scale that is taken from all inputs.

    Attributes:
        inner: The projection.
        real: For each input whether it counts.
    """

    def __init__(self, inner: Any, real: Any):
        self.inner = inner
        self.real = nnx.Variable(jnp.asarray(real))

    @property
    def out_features(self) -> int:
        return int(self.inner.out_features)

    def __call__(self, x: Any) -> Any:
        real = self.real[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return self.inner(jnp.where(real, x, 0))

    def rows(self, ids: Any) -> Any:
        return self.inner.rows(ids)


def take_inputs(projection: Any, columns: Index) -> Any:
    """`slice_inputs`, and inputs of -1 masked."""
    if isinstance(projection, MaskedInputs):
        projection = projection.inner
    taken = slice_inputs(projection, columns)
    real = columns.reshape(-1) >= 0
    return taken if real.all() else MaskedInputs(taken, real)


@slice_outputs.register
def _(projection: Linear, rows: np.ndarray) -> Linear:
    return Linear.from_weight(take(projection.weight, rows, 0), _bias(projection, rows))


@slice_inputs.register
def _(projection: Linear, columns: np.ndarray) -> Linear:
    weight = take(projection.weight, columns, 1)
    return Linear.from_weight(weight, _whole_bias(projection))


@slice_outputs.register
def _(projection: GGUFLinear, rows: np.ndarray) -> GGUFLinear:
    blocks = take(projection.blocks, rows, 0)  # a block of zero bytes is zeros
    return GGUFLinear(blocks, projection.encoding, _bias(projection, rows))


@slice_inputs.register
def _(projection: GGUFLinear, columns: np.ndarray) -> Any:
    values, bias = projection.encoding.values, _whole_bias(projection)
    if run_length(columns, values) == values:
        blocks = take(projection.blocks, runs(columns, values), 1)
        return GGUFLinear(blocks, projection.encoding, bias)
    # A head ends inside a block: taken apart, the numbers are the same to the bit.
    codes = gguf.unpack(projection.blocks[...], projection.encoding)
    return slice_inputs(CodesLinear(codes, bias), columns)


@slice_outputs.register
def _(projection: CodesLinear, rows: np.ndarray) -> CodesLinear:
    codes = jax.tree.map(lambda leaf: take(leaf, rows, 0), projection.codes)
    return CodesLinear(codes, _bias(projection, rows))


@slice_inputs.register
def _(projection: CodesLinear, columns: np.ndarray) -> CodesLinear:
    old = projection.codes
    group = run_length(columns, old.group)
    finer = lambda x: take(
        jnp.repeat(x, old.group // group, axis=1), runs(columns, group), 1
    )
    codes = gguf.Codes(
        codes=take(old.codes, columns, 1),
        scale=finer(old.scale),
        offset=None if old.offset is None else finer(old.offset),
        group=group,
    )
    return CodesLinear(codes, _whole_bias(projection))


@slice_outputs.register
def _(projection: GPTQLinear, rows: np.ndarray) -> GPTQLinear:
    config, scales = projection.config, projection.scales
    _check_words("outputs", rows, config.bits)
    new = nnx.clone(projection)
    new.qweight = nnx.Variable(take(projection.qweight, rows, 1))
    new.scales = nnx.Variable(take(scales, rows, 1))  # a scale of 0 makes zeros
    new.bias = nnx.data(_param(_bias(projection, rows)))
    if projection.qzeros is not None:
        zeros = gptq.unpack_zeros(projection.qzeros[...], config, scales.shape[1])
        taken = np.asarray(take(zeros, rows, 1))
        packed = gptq.pack_zeros(taken.astype(np.int64), config)
        new.qzeros = nnx.Variable(jnp.asarray(packed))
    return new


@slice_inputs.register
def _(projection: GPTQLinear, columns: np.ndarray) -> GPTQLinear:
    config, C = projection.config, projection.in_features
    _check_words("inputs", columns, config.bits)
    codes = gptq.unpack(projection.qweight[...], config.bits)[:C]
    taken = np.asarray(take(codes, columns, 0)).astype(np.int64)
    packed = gptq.pack(taken, config.bits)
    groups = projection.g_idx
    if groups is None or not config.desc_act:
        groups = jnp.asarray(gptq.contiguous_groups(C, config))
    new = nnx.clone(projection)
    new.qweight = nnx.Variable(jnp.asarray(packed))
    # Every part keeps all scales, and its inputs say which of them are theirs.
    new.g_idx = nnx.data(nnx.Variable(take(groups, columns, 0)))
    new.config = dataclasses.replace(config, desc_act=True)
    new.in_features = columns.size
    return new


def _check_words(name: str, index: Index, bits: int) -> None:
    per = 32 if bits == 3 else 32 // bits
    if len(index) > 1 and index.shape[-1] % per:
        raise ValueError(
            f"GPTQ packs {per} {name} of {bits} bits together; {len(index)} devices with "
            f"{index.shape[-1]} each would cut them apart."
        )


@slice_outputs.register
def _(projection: Float8Linear, rows: np.ndarray) -> Float8Linear:
    config, scale = projection.config, projection.weight_scale[...]
    spec = config.weight_scale
    if spec.block_size is not None:
        b0, b1 = spec.block_size
        size = run_length(rows, b0)
        scale = take(jnp.repeat(scale, b0 // size, axis=0), runs(rows, size), 0)
        spec = dataclasses.replace(spec, block_size=(size, b1))
    elif spec.is_rowwise:
        scale = take(scale, rows, 0)
    return _float8(
        projection,
        config=dataclasses.replace(config, weight_scale=spec),
        weight=take(projection.weight, rows, 0),
        weight_scale=scale,
        bias=_bias(projection, rows),
    )


@slice_inputs.register
def _(projection: Float8Linear, columns: np.ndarray) -> Float8Linear:
    config = projection.config
    weight, scale = projection.weight[...], projection.weight_scale[...]
    if (block := config.weight_scale.block_size) is not None:
        if run_length(columns, block[1]) != block[1]:
            raise ValueError(
                f"inputs are brought to float8 in blocks of {block[1]} lanes, which "
                "would lie on two devices: each device's heads must fill whole blocks."
            )
        scale = take(scale, runs(columns, block[1]), 1)
    pairs = runs(columns, 2) if config.is_nvfp4 else columns  # two numbers in a byte
    return _float8(
        projection,
        config=config,
        weight=take(weight, pairs, 1),
        weight_scale=scale,
        bias=_whole_bias(projection),
    )


def _float8(old: Float8Linear, *, config: Any, **tensors: Any) -> Float8Linear:
    single: dict[str, Any] = {
        name: None if (held := getattr(old, name)) is None else held[...]
        for name in ("input_scale", "weight_scale_2")
    }
    return Float8Linear(config, **tensors, **single)


def _param(bias: Any) -> Any:
    return None if bias is None else nnx.Param(bias)
