"""The decoder-only transformer of the Llama family."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .._core.errors import check_groups
from .._core.types import MaskMod
from ..kv_cache import KVCacheParams, PagedKVCache
from ..mods import Causal, SlidingWindow
from ..nn.attention import AbstractAttention
from ..nn.linear import Projection
from ..nn.norm import RMSNorm
from ..nn.packed_linear import LayerNumber, Stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder, checked against each other once.

    Attributes:
        vocab_size: Tokens.
        hidden_size: Width between layers, C.
        num_layers: L.
        num_attention_heads: H.
        num_key_value_heads: K.
        head_dim: D.
        intermediate_size: Width inside the feed-forward block.
        rms_norm_eps: Of every norm.
        max_position: Longest context the model was made for, in tokens.
        sliding_window: Keys a query sees, itself included; None for all before it.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position: int
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        check_groups(self.num_attention_heads, self.num_key_value_heads)
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size is not None and not size > 0:
                raise ValueError(f"{field.name}={size} must be positive.")

    @property
    def mask_mod(self) -> MaskMod:
        window = self.sliding_window
        return Causal() if window is None else SlidingWindow(window)

    def kv_params(self, dtype: DTypeLike, page_size: int = 128) -> KVCacheParams:
        """Sizes of the cache this model writes to."""
        return KVCacheParams(
            dtype=dtype,
            n_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            num_layers=self.num_layers,
            page_size=page_size,
        )


class GatedMLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``. Shazeer 2020, arXiv:2002.05202 (SwiGLU).

    Args:
        up: None where ``gate`` makes both, first the gate's outputs, then those of up.
    """

    def __init__(self, gate: Projection, up: Projection | None, down: Projection):
        self.gate, self.up, self.down = gate, nnx.data(up), down

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
        if self.up is None:
            gate, up = jnp.split(self.gate(x), 2, axis=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(jax.nn.silu(gate) * up)


class DecoderLayer(nnx.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))``."""

    def __init__(
        self,
        attention_norm: RMSNorm,
        attention: AbstractAttention,
        mlp_norm: RMSNorm,
        mlp: GatedMLP,
    ):
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def __call__(self, x, cache, **options):
        y, cache = self.attention(self.attention_norm(x), cache, **options)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class LayerStack(nnx.Module):
    """Layers of one structure, run by one loop, so that each compiles once.

    Their arrays are stacked on a new first axis, packed weights on the one that they
    have. On a CPU the loop is as fast as layers written out one after another, compiles
    L times faster, and a chunk of prompt unpacks the weights of one layer at a time.
    """

    def __init__(self, layers: Sequence[DecoderLayer]):
        graph, *first = nnx.split(layers[0], *_KINDS)
        states = [first]
        for number, layer in enumerate(layers[1:], 1):
            other, *state = nnx.split(layer, *_KINDS)
            if other != graph:
                raise ValueError(
                    f"layer {number} is not built as layer 0 is; such layers go into "
                    "stacks of their own."
                )
            states.append(state)
        whole, numbers, rest = zip(*states, strict=True)
        whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *whole)
        count = jnp.arange(len(states), dtype=jnp.int32)
        numbers = jax.tree.map(lambda _: count, numbers[0])
        rest = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rest)
        self.layer = nnx.merge(graph, whole, numbers, rest)
        self.size = len(states)

    def __call__(self, x, cache, first, **options):
        """Runs the layers; they use layers ``first, first + 1, ...`` of the cache."""
        graph, whole, *states = nnx.split(self.layer, *_KINDS)

        def step(carry, layer):
            number, states = layer
            merged = nnx.merge(graph, whole, *states)
            return merged(*carry, layer=number, **options), None

        numbers = first + jnp.arange(self.size, dtype=jnp.int32)
        return jax.lax.scan(step, (x, cache), (numbers, states))[0]


# What `LayerStack` hands to its layers whole, what it counts, and what it stacks.
_KINDS = Stacked, LayerNumber, ...


def stacked(layers: Sequence[DecoderLayer]) -> list[LayerStack]:
    """The layers in as few stacks as their structures allow, in order."""
    runs = itertools.groupby(layers, key=nnx.graphdef)
    return [LayerStack(list(run)) for _, run in runs]


class Decoder(nnx.Module):
    """Token ids to logits.

    Attributes:
        embed: A projection whose rows are the tokens' vectors.
        stacks: The layers, neighbours of one structure together.
        norm: Before the logits.
        head: A projection to logits; ``embed`` itself when the two are tied.
        kv_dtype: Of the keys and values that generation keeps.
    """

    def __init__(
        self,
        config: DecoderConfig,
        embed: Projection,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        head: Projection | None = None,
        *,
        kv_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.kv_dtype = config, jnp.dtype(kv_dtype)
        self.embed, self.norm = embed, norm
        self.stacks = nnx.List(stacked(layers))
        self.head = nnx.data(head)

    def __call__(
        self,
        tokens: Int[Array, "*rows"],
        cache: PagedKVCache | None = None,
        *,
        row_offsets: Int[Array, " offsets"] | None = None,
        logit_rows: Int[Array, " n"] | None = None,
    ) -> tuple[Float[Array, "... V"], PagedKVCache | None]:
        """Logits of the token after each row, in float32, and the cache.

        Args:
            tokens: ``(B, T)``; with a cache also ragged rows ``(R,)``.
            cache: None means a whole pass. It comes back longer by the new rows.
            row_offsets: Where each sequence's rows begin, for ragged rows.
            logit_rows: Rows of a ragged batch to work out logits for; all by default.
        """
        if cache is not None and tokens.ndim == 2:
            row_offsets = jnp.arange(tokens.shape[0] + 1, dtype=jnp.int32)
            row_offsets = row_offsets * tokens.shape[1]
            logits, cache = self(
                tokens.reshape(-1),
                cache,
                row_offsets=row_offsets,
                logit_rows=logit_rows,
            )
            if logit_rows is None:
                logits = logits.reshape(*tokens.shape, -1)
            return logits, cache
        x = self.embed.rows(tokens)
        mask_mod = self.config.mask_mod
        first = 0
        for stack in self.stacks:
            x, cache = stack(
                x, cache, first, row_offsets=row_offsets, mask_mod=mask_mod
            )
            first += stack.size
        if logit_rows is not None:
            x = x[logit_rows]
        head = self.embed if self.head is None else self.head
        logits = head(self.norm(x)).astype(jnp.float32)
        if cache is None or row_offsets is None:
            return logits, cache
        return logits, cache.advance(row_offsets)
