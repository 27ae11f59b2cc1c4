"""The projections of MaxText's `Attention`, under its methods' names.

B sequences of T or S rows, E numbers wide; N query heads, K key and value heads of D.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from .dense import DenseGeneral, RMSNorm, divided
from .sharding import constrain


class Projections(nnx.Module):
    """Makes and applies them; ``options`` says which there are."""

    options: Any
    rngs: nnx.Rngs
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    value_norm: RMSNorm | None
    out: DenseGeneral

    def _constrained(self, x: jax.Array, names: Sequence[str | None]) -> jax.Array:
        o = self.options
        return constrain(x, names, o.settings.logical_axis_rules, o.mesh)

    def _dense(
        self,
        into: Sequence[int],
        out: Sequence[int],
        names: Sequence[str],
        init: Callable[..., jax.Array] | None = None,
        use_bias: bool = False,
    ) -> DenseGeneral:
        o = self.options
        precision = o.settings.matmul_precision
        return DenseGeneral(
            into,
            out,
            names=names,
            kernel_init=init or o.kernel_init,
            dtype=o.dtype,
            weight_dtype=o.weight_dtype,
            use_bias=use_bias,
            quant=o.quant,
            precision=None if precision == "default" else precision,
            place=lambda x, names: self._constrained(x, names),
            rngs=self.rngs,
        )

    def _init_projections(self) -> None:
        o = self.options
        if o.settings.fused_qkv:
            self.qkv_proj = self.init_qkv_w(o.inputs_q_shape)
        else:
            self.query = self.init_query_w(o.inputs_q_shape)
            self.key = self.init_kv_w(o.inputs_kv_shape)
            if not o.share_kv_projections:
                self.value = self.init_kv_w(o.inputs_kv_shape)
        if o.use_qk_norm and not self._is_llama4:
            self.query_norm = self._norm(o.num_query_heads)
            self.key_norm = self._norm(o.num_kv_heads)
        if getattr(o, "use_v_norm", False):
            self.value_norm = self._value_norm()

    @property
    def _is_llama4(self) -> bool:
        return self.options.settings.block.startswith("llama4")

    def _norm(self, heads: int) -> RMSNorm:
        o, s = self.options, self.options.settings
        every_head = s.is_model("olmo3")
        return RMSNorm(
            o.head_dim * (heads if every_head else 1),
            eps=s.normalization_layer_epsilon,
            dtype=o.dtype,
            weight_dtype=o.weight_dtype,
            has_scale=s.qk_norm_with_scale,
            all_heads=every_head,
        )

    def _value_norm(self) -> RMSNorm:
        o, s = self.options, self.options.settings
        return RMSNorm(
            o.head_dim,
            eps=s.normalization_layer_epsilon,
            dtype=o.dtype,
            weight_dtype=o.weight_dtype,
            has_scale=s.v_norm_with_scale,
        )

    def convert_dense_general_inputs_shape(
        self,
        inputs_shape: tuple[int, ...] | None = None,
        axis: Iterable[int] | int = -1,
    ) -> tuple[int, ...]:
        """The sizes of these axes of an input."""
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        shape = self.options.inputs_q_shape if inputs_shape is None else inputs_shape
        return tuple(shape[a] for a in axes)

    def init_query_w(self, inputs_q_shape: tuple[int, ...]) -> DenseGeneral:
        """``(E, N, D)``. Its initial weights are divided by ``sqrt(D)``.

        Not so with config.use_qk_norm, nor with a query_pre_attn_scalar other than 1.
        """
        o = self.options
        scalar = o.query_pre_attn_scalar
        scaled = o.settings.use_qk_norm or (scalar is not None and scalar != 1)
        by = 1.0 if scaled else o.head_dim**0.5
        return self._dense(
            self.convert_dense_general_inputs_shape(inputs_q_shape),
            (o.num_query_heads, o.head_dim),
            ("embed", "q_heads", "kv"),
            divided(o.kernel_init, by),
            o.use_bias_in_projections,
        )

    def query_projection(self, inputs_q: jax.Array, out_sharding: Any = None):
        """``(B, T, E) -> (B, T, N, D)``."""
        return _placed(self.query(inputs_q), "query_proj", out_sharding)

    def init_kv_w(self, inputs_kv_shape: tuple[int, ...]) -> DenseGeneral:
        """``(E, K, D)``, for keys or values."""
        o = self.options
        return self._dense(
            self.convert_dense_general_inputs_shape(inputs_kv_shape),
            (o.num_kv_heads, o.head_dim),
            ("embed", "kv_heads", "kv_head_dim"),
            use_bias=o.use_bias_in_projections,
        )

    def kv_projection(
        self, inputs_kv: jax.Array, proj_name: str, out_sharding: Any = None
    ):
        """``(B, S, E) -> (B, S, K, D)`` by the projection "key" or "value"."""
        if proj_name not in ("key", "value"):
            raise ValueError(f"proj_name must be 'key' or 'value', but got {proj_name}")
        shared = self.options.share_kv_projections
        projection = self.key if proj_name == "key" or shared else self.value
        return _placed(projection(inputs_kv), f"{proj_name}_proj", out_sharding)

    def init_qkv_w(self, inputs_shape: tuple[int, ...]) -> DenseGeneral:
        """``(E, N + 2 K, D)``: query heads, key heads, value heads."""
        o = self.options
        return self._dense(
            self.convert_dense_general_inputs_shape(inputs_shape),
            (o.num_query_heads + 2 * o.num_kv_heads, o.head_dim),
            ("embed", "heads", "kv"),
            use_bias=o.use_bias_in_projections,
        )

    def qkv_projection(
        self, inputs: jax.Array, proj_name: str, out_sharding: Any = None
    ):
        """q, k and v of one product. ``proj_name`` can be "qkv_proj" alone.

        Cut along the heads, which means the same on every mesh. (MaxText cuts each
        device's part, so that a checkpoint depends on how many devices there are.)
        """
        if proj_name != "qkv_proj":
            raise ValueError(f"proj_name must be 'qkv_proj', but got {proj_name}")
        N, K = self.options.num_query_heads, self.options.num_kv_heads
        y = _placed(self.qkv_proj(inputs), "qkv_proj", out_sharding)
        return y[:, :, :N], y[:, :, N : N + K], y[:, :, N + K :]

    @property
    def out_head_dim(self) -> int:
        """Head size of what enters the output projection."""
        return self.options.head_dim

    def init_out_w(self, output_dim: int) -> DenseGeneral:
        """``(N, D, E)``. Without a bias in a decoder block of Qwen 2."""
        o = self.options
        return self._dense(
            (o.num_query_heads, self.out_head_dim),
            (output_dim,),
            ("heads", "kv", "embed"),
            use_bias=o.use_bias_in_projections and o.settings.block != "qwen2",
        )

    def out_projection(self, out: jax.Array, out_sharding: Any = None) -> jax.Array:
        """``(B, T, N, D) -> (B, T, E)``."""
        return _placed(self.out(out), "out_proj", out_sharding)


def _placed(y: jax.Array, name: str, out_sharding: Any) -> jax.Array:
    """``y`` under a name that remat policies know, where it shall lie."""
    if out_sharding is not None:
        y = jax.lax.with_sharding_constraint(y, out_sharding)
    return checkpoint_name(y, name)
