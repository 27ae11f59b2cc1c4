"""MaxText's `Attention`: its names and shapes around raptax's kernels and caches.

What happens to an input, in order: projections; RMS norm of queries and keys; rotary
positions; Llama 4's L2 norm; the factors on queries; the cache; `raptax.attention`; the
output projection. Scores are not scaled: ``1 / sqrt(head_dim)`` is divided out of the
query projection's initial weights, so MaxText's checkpoints mean here what they mean
there. To load one of a library that scales scores, pass
``query_pre_attn_scalar=head_dim ** -0.5``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ..._core.errors import Unsupported, choices
from ...api.attention import attention
from ...kv_cache.contiguous import ACTIVE
from ...kv_cache.positioned import AttendSettings, KVSegment, attend
from ...mods import SoftCap, and_masks
from ...rope.turns import wide_dtype
from . import kvcache, masks, positions, serving
from .dense import L2Norm, RMSNorm, param
from .options import MODES, AttentionOptions, Number, signature_of
from .projections import Projections

DECODE_QUERY = "decode_batch", "decode_length", "activation_heads", "activation_kv"
DECODE_KEY = "decode_batch", "decode_length", "activation_kv_heads", "activation_kv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOptions(AttentionOptions):
    """What the NNX classes take beyond the documented factory of Linen modules.

    Attributes:
        rope_max_timescale: Instead of config.rope_max_timescale.
        partial_rotary_factor: Instead of config.partial_rotary_factor.
        use_v_norm: RMS norm of the values, per head; config.v_norm_with_scale says
            whether it has weights.
        share_kv_layer: `forward_serve_vllm` leaves the cache as it is.
    """

    rope_max_timescale: Number | None = None
    partial_rotary_factor: Number | None = None
    use_v_norm: bool = False
    share_kv_layer: bool = False

    __hash__ = AttentionOptions.__hash__
    is_latent = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kind == "mla") != self.is_latent:
            fitting = "MLA" if self.kind == "mla" else "Attention"
            raise ValueError(f"attention_type={self.kind!r} is the class {fitting}.")


class Attention(Projections):
    """Attention under MaxText's names. Takes the fields of `LayerOptions`.

    Parameters are ``query/kernel`` (E, N, D), ``key/kernel`` and ``value/kernel``
    (E, K, D), ``out/kernel`` (N, D, E), with ``bias`` beside them if asked for; with
    config.fused_qkv ``qkv_proj/kernel`` (E, N + 2 K, D); ``query_norm/scale`` and
    ``key_norm/scale`` with use_qk_norm; ``value_norm/scale`` with use_v_norm; ``sinks``
    (N,) with config.attention_sink.

    A layer built with another model_mode than "train" has a cache of its own, in which
    prompts and generated tokens lie apart, and a call's model_mode says what to do with
    it: "prefill" writes a prompt, "autoregressive" appends one token. Each row so
    computed equals the row of one pass over the whole sequence, whatever the options.

    ``compute_axis_order`` and ``reshape_q`` change how products are laid out, not what
    comes out; kernels here take heads before lengths, whichever order is asked for.
    float32, or float64 where arrays are that, is what scores and sums are always computed
    in; ``float32_qk_product`` and ``float32_logits`` hand kernels such arrays, so that
    nothing is rounded on the way.
    temperature_tuning concerns NoPE layers alone.

    Raises:
        ValueError: Options that cannot be, with the choices there are.
    """

    Options: type[AttentionOptions] = LayerOptions
    options: Any  # of that type

    def __init__(self, *, rngs: nnx.Rngs, **kwargs: Any):
        self.options = o = self.Options(**kwargs)
        self.rngs = rngs.fork()
        self.rotary_embedding = self.init_rotary_embedding()
        self.query_norm: RMSNorm | None = nnx.data(None)
        self.key_norm: RMSNorm | None = nnx.data(None)
        self.value_norm: RMSNorm | None = nnx.data(None)
        self._init_projections()
        self.out = self.init_out_w(o.inputs_q_shape[-1])
        sinks = o.settings.attention_sink
        zeros = jnp.zeros(o.num_query_heads, o.weight_dtype)
        self.sinks = param(zeros, ("q_heads",)) if sinks else None
        if o.model_mode != "train" and not o.serves_vllm:
            setattr(self, self._cache_name, self.init_kv_caches(o.inputs_kv_shape))

    def __getattr__(self, name: str) -> Any:
        """Options are attributes too: ``layer.num_query_heads``, ``layer.config``."""
        options = vars(self).get("options")
        if options is not None and name in type(options).__dataclass_fields__:
            return getattr(options, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")

    # -------------------------------------------------------------------- positions

    def init_rotary_embedding(self) -> Any:
        """The rotary embedding of this layer; see `positions.choose`."""
        o = self.options
        return positions.choose(
            o, o.head_dim, theta=o.rope_max_timescale, factor=o.partial_rotary_factor
        )

    def apply_rotary_embedding(
        self,
        inputs: jax.Array,
        inputs_positions: jax.Array | None = None,
        rope_kwargs: dict[str, Any] | None = None,
    ) -> jax.Array:
        """Rotates ``(B, S, heads, D)`` by positions ``(B, S)``, or ``(B, S, 3)``.

        Images know their own positions: Qwen's takes ``num_frames``, ``height``,
        ``width`` and ``token_mask`` from ``rope_kwargs``.
        """
        rotary = self.rotary_embedding
        if isinstance(rotary, positions.QwenVisionRotary):
            return rotary(inputs, **(rope_kwargs or {}))
        if rope_kwargs:
            raise ValueError(f"{type(rotary).__name__} takes no {sorted(rope_kwargs)}.")
        if isinstance(rotary, positions.LlamaVisionRotary):
            return rotary(inputs)
        return rotary(inputs, inputs_positions)

    # ----------------------------------------------------------------- what is attended

    def _heads(self, inputs_q, inputs_kv, inputs_positions, rope_kwargs):
        """q, k and v as they enter attention, k and v as they enter a cache."""
        o = self.options
        if inputs_q.shape[:2] != inputs_kv.shape[:2] and not o.is_nope_layer:
            raise ValueError(
                f"inputs_q {inputs_q.shape} and inputs_kv {inputs_kv.shape} share their "
                "positions, so there must be as many rows; or is_nope_layer=True."
            )
        q, k, v = self._projected(inputs_q, inputs_kv)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.value_norm is not None:
            v = self.value_norm(v)
        if not o.is_nope_layer:
            turn = self.apply_rotary_embedding
            q, k = (turn(x, inputs_positions, rope_kwargs) for x in (q, k))
            if o.use_qk_norm and self._is_llama4:
                norm = L2Norm(o.settings.normalization_layer_epsilon)
                q, k = norm(q), norm(k)
        return self._scaled(q, inputs_positions), k, v

    def _projected(self, inputs_q, inputs_kv):
        if not self.options.settings.fused_qkv:
            q = self.query_projection(inputs_q)
            return q, *(self.kv_projection(inputs_kv, n) for n in ("key", "value"))
        q, k, v = self.qkv_projection(inputs_q, "qkv_proj")
        if inputs_kv is not inputs_q:
            _, k, v = self.qkv_projection(inputs_kv, "qkv_proj")
        return q, k, v

    def _scaled(self, q, inputs_positions):
        o = self.options
        if o.query_pre_attn_scalar:
            q = q * jnp.asarray(o.query_pre_attn_scalar, q.dtype)
        if o.temperature_tuning and o.is_nope_layer:
            wide, span = wide_dtype(q), float(o.temperature_tuning_floor_scale)
            if span.is_integer():  # exact at any distance
                turn = ((inputs_positions + 1) // int(span)).astype(wide)
            else:
                turn = jnp.floor((inputs_positions.astype(wide) + 1) / span)
            factor = 1 + o.temperature_tuning_scale * jnp.log1p(turn)
            q = (q.astype(wide) * factor[:, :, None, None]).astype(q.dtype)
        return q

    def _expanded(self, key, value):
        """Keys and values of every head, from what a cache holds."""
        return key, value

    def _absorbed(self, query, held: list[KVSegment]):
        """The same question put to what a cache holds, and how to read the answer."""
        return query, held, lambda y: y

    def _settings(self, deterministic: bool) -> AttendSettings:
        """All but the mask."""
        o = self.options
        cap, drops = o.attn_logits_soft_cap, o.dropout_rate > 0 and not deterministic
        return AttendSettings(
            score_mod=SoftCap(float(cap)) if cap else None,
            sinks=self._wide_sinks,
            scale=1.0,
            dropout_rng=self.rngs.dropout() if drops else None,
            dropout_rate=float(o.dropout_rate),
            deterministic=not drops,
            kernel=o.kernel,
        )

    @property
    def _wide_sinks(self) -> Any:
        if self.sinks is None:
            return None
        sinks = self.sinks[...]
        return sinks.astype(wide_dtype(sinks))

    def _operands(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """(B, T, H, D) -> (B, H, T, D), in float32 or wider if that is asked for."""
        o = self.options
        wide = o.float32_qk_product or o.float32_logits
        swapped = (x.swapaxes(1, 2) for x in arrays)
        return tuple(x.astype(wide_dtype(x)) if wide else x for x in swapped)

    def _attend_rows(self, q, k, v, segment_ids, bidirectional_mask, deterministic):
        """Attends to keys that lie in order, up to and with the query rows' own."""
        o = self.options
        q, k, v = self._operands(q, *self._expanded(k, v))
        B, _, T, _ = q.shape
        S = k.shape[2]
        narrow = None
        if segment_ids is not None:
            own, others = segment_ids
            narrow = masks.segments(own, others, S - T)
        runs = None if bidirectional_mask is None else masks.runs(bidirectional_mask)
        allow = masks.combined(masks.base_mask(o), narrow, bidirectional=runs)
        if o.settings.moba:
            at = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
            allow = _and(allow, masks.moba(q, [KVSegment(k, v, at)], at[:, S - T :], o))
        settings = self._settings(deterministic)._replace(mask_mod=allow)
        return attention(q, k, v, **settings._asdict()).swapaxes(1, 2)

    def _attend_cache(self, q, cache, bidirectional_mask, deterministic):
        """Attends with one row to a cache that holds its own key."""
        o = self.options
        (query,) = self._operands(q)
        query, held, back = self._absorbed(query, cache.held(query.dtype))
        at = cache.next_positions[:, None] - 1
        if o.reshape_q:  # two equal rows, of which the first is kept
            query, at = jnp.repeat(query, 2, axis=2), jnp.repeat(at, 2, axis=1)
        runs = None if bidirectional_mask is None else masks.runs(bidirectional_mask)
        allow = masks.combined(masks.base_mask(o), bidirectional=runs)
        if o.settings.moba:
            allow = _and(allow, masks.moba(query, held, at, o))
        settings = self._settings(deterministic)._replace(mask_mod=allow)
        block = o.ragged_block_size if self._is_ragged else None
        y = attend(query, held, at, settings, block=block)[:, :, :1]
        y = jnp.where(cache.overflowed[:, None, None, None], jnp.nan, y)
        return back(y.swapaxes(1, 2))

    # ----------------------------------------------------------------------- caches

    _cache_name = "KVCache_0"

    @property
    def _is_ragged(self) -> bool:
        return self.options.use_ragged_attention or self.attention_kernel == "ragged"

    def init_kv_caches(self, inputs_kv_shape: tuple[int, ...]) -> Any:
        """An empty cache for ``inputs_kv_shape[0]`` sequences."""
        o = self.options
        return kvcache.create(
            o, inputs_kv_shape[0], o.num_kv_heads, (o.head_dim, o.head_dim)
        )

    @property
    def _cache(self) -> Any:
        if self._cache_name not in vars(self):
            raise ValueError(
                f"this layer has no cache: it was built with model_mode="
                f"{self.model_mode!r}. Build it with 'prefill' or 'autoregressive'."
            )
        return getattr(self, self._cache_name)

    def _updated(self, key, value, segment_ids, model_mode, start) -> Any:
        """Writes, and returns the cache as a value."""
        variables = self._cache
        cache = variables.value
        if model_mode == "prefill":
            cache = cache.with_prompt(key, value, segment_ids, start)
        else:
            append = cache.append_ragged if self._is_ragged else cache.append
            cache = append(key, value, segment_ids)
        variables.store(cache)
        return cache

    def update_kv_caches(
        self,
        key: jax.Array,
        value: jax.Array,
        decoder_segment_ids: jax.Array | None,
        model_mode: str,
        previous_chunk: Any = None,
    ) -> list[Any]:
        """Writes keys and values ``(B, T, K, D)`` and returns what the cache holds.

        Returns:
            ``[(key, value, segment_ids), ar]`` in the order (batch, length, heads,
            size): the prompt so far, and None or, in "autoregressive" mode,
            ``(key, value, segment_ids, lengths)`` of what was generated. A ring's
            contents stand in the second place. In "train" mode the arguments.
        """
        _check_mode(model_mode)
        if model_mode == "train":
            return [(key, value, decoder_segment_ids), None]
        start = 0 if previous_chunk is None else previous_chunk.shape[1]
        if self.options.settings.ring_kv_cache:
            variables = self._cache
            real = _real(key.shape[:2], decoder_segment_ids)
            ring = variables.value if model_mode != "prefill" else variables.value.empty
            ring = ring.append(key, value, real)
            variables.store(ring)
            return [None, (*kvcache.logical(ring.ring, key.dtype), ring.lengths)]
        ids = decoder_segment_ids
        cache = self._updated(key, value, ids, model_mode, start)
        prompt = kvcache.logical(cache.prefill, key.dtype)
        if model_mode == "prefill":
            return [tuple(x[:, : start + key.shape[1]] for x in prompt), None]
        later = kvcache.logical(cache.generated, key.dtype)
        return [prompt, (*later, cache.lengths)]

    def _prefill(self, q, k, v, segment_ids, start, bidirectional_mask, deterministic):
        T = q.shape[1]
        cache = self._updated(k, v, segment_ids, "prefill", start)
        ids = cache.prefill.segment_ids[:, : start + T]
        pair = None if segment_ids is None and not start else (ids[:, start:], ids)
        if start:  # the chunks before lie in the cache alone
            key, value = cache.prefill.read(k.dtype, start)
            k = jnp.concatenate([key.swapaxes(1, 2), k], axis=1)
            v = jnp.concatenate([value.swapaxes(1, 2), v], axis=1)
        return self._attend_rows(q, k, v, pair, bidirectional_mask, deterministic)

    def _attend_ring(self, q, k, v, segment_ids, fresh, deterministic):
        variables, o = self._cache, self.options
        ring = variables.value.empty if fresh else variables.value
        settings = self._settings(deterministic)._replace(mask_mod=masks.base_mask(o))
        if o.float32_qk_product or o.float32_logits:
            q, k, v = (x.astype(wide_dtype(x)) for x in (q, k, v))
        real = _real(q.shape[:2], segment_ids)
        y, ring = ring.append_and_attend(q, k, v, settings, real=real)
        variables.store(ring)
        return y

    # ---------------------------------------------------------------------- serving

    def forward_serve_vllm(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        rpa_kv_cache: Any = None,
        rpa_metadata: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Attends over pages, as vLLM's engine asks; see `serving.serve`.

        Args:
            query: ``(B, T, N, D)``: packed (ragged) tokens.
            key: ``(B, T, K, D)``.
            value: Likewise.
            rpa_kv_cache: This layer's pages, or a list that holds them.
            rpa_metadata: With ``seq_lens``, ``block_tables``, ``query_start_loc`` and
                ``request_distribution``, as attributes or as keys.

        Returns:
            The rows attended, ``(B * T, N, D)``, and the cache with keys and values
            written. Without a cache or metadata the query and an empty list: that is how
            an engine measures memory, and nothing is attended.
        """
        q, k, v = (
            x.reshape(-1, *x.shape[2:]).astype(self.options.dtype)
            for x in (query, key, value)
        )
        if rpa_kv_cache is None or rpa_metadata is None:
            return q, []
        o = self.options
        if o.kind not in ("global", "local_sliding") or o.settings.moba:
            raise Unsupported(
                "pages serve attention_type 'global' and 'local_sliding', not "
                f"{o.kind!r}."
            )
        cache = rpa_kv_cache
        y, new = serving.serve(
            (q, k, v),
            cache[0] if isinstance(cache, list | tuple) else cache,
            rpa_metadata,
            sinks=self._wide_sinks,
            window=o.window,
            soft_cap=o.attn_logits_soft_cap or None,
            update=not o.share_kv_layer,
        )
        return y, [new] if isinstance(cache, list | tuple) else new

    # ---------------------------------------------------------------------- the call

    def _names(self, what: str, model_mode: str) -> Sequence[str]:
        """The logical axis names of "input", "query", "key", "value" or "out"."""
        if model_mode == "autoregressive" and what in ("query", "key", "value"):
            return DECODE_QUERY if what == "query" else DECODE_KEY
        prefix = {"train": "", "prefill": "prefill_", "autoregressive": "decode_"}
        return getattr(self.options, f"{prefix[model_mode]}{what}_axis_names")

    def _positions(self, inputs_q, given, model_mode, start):
        """Where rows stand: as given, or counting on from what there is."""
        if given is not None or self.options.serves_vllm:
            return given
        B, T = inputs_q.shape[:2]
        first = jnp.full((B, 1), start, jnp.int32)
        if self.options.settings.ring_kv_cache and model_mode != "train":
            fresh = model_mode == "prefill" and not start
            first = first if fresh else self._cache.value.lengths[:, None]
        elif model_mode == "autoregressive":
            first = self._cache.value.next_positions[:, None]
        return first + jnp.arange(T, dtype=jnp.int32)[None]

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_kv: jax.Array | None = None,
        inputs_positions: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        out_sharding: Any = None,
        *,
        model_mode: str = "train",
        deterministic: bool = False,
        previous_chunk: Any = None,
        slot: Any = None,
        page_state: Any = None,
        bidirectional_mask: jax.Array | None = None,
        rope_kwargs: dict[str, Any] | None = None,
        kv_cache: Any = None,
        attention_metadata: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Attends with the rows of ``inputs_q``.

        Args:
            inputs_q: ``(B, T, E)``.
            inputs_kv: ``(B, S, E)``; ``inputs_q`` unless given.
            inputs_positions: ``(B, T)``, for rotary and temperature; with mRoPE also
                ``(B, T, 3)``. Counted from the start, or on from the cache, unless
                given. Masks go by a token's place in its row, not by these.
            decoder_segment_ids: ``(B, T)``: who is packed with whom, and what is padding
                (0). In a prompt 1 marks the tokens that generated ones will see.
            out_sharding: Where the output shall lie.
            model_mode: "train", "prefill" or "autoregressive" (one token).
            deterministic: True turns dropout off.
            previous_chunk: ``(B, n, ...)`` for a prompt in chunks: the ``n`` tokens
                before this one are in the cache already. Only its shape is read.
            slot: For MaxText's own pages; they are not here, so None.
            page_state: Likewise; see ``kv_cache`` for pages.
            bidirectional_mask: ``(B, S)``: runs of ones see each other both ways.
            rope_kwargs: For `apply_rotary_embedding`.
            kv_cache: Pages for `forward_serve_vllm`; otherwise handed through.
            attention_metadata: What lies in them.

        Returns:
            ``(B, T, E)``, and ``kv_cache``. A generated token for which the cache has no
            slot is NaN under ``jit``, where it cannot raise.

        Raises:
            ValueError: More than one token in "autoregressive" mode; a layer without a
                cache in a mode that needs one; a full cache; shapes that do not fit.
        """
        if slot is not None or page_state is not None:
            raise Unsupported(
                "slot and page_state speak of MaxText's page manager, which is not here; "
                "pages are served with attention_kernel='vllm_rpa' and kv_cache."
            )
        start = _check_call(inputs_q, model_mode, previous_chunk)
        o = self.options
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        same = inputs_kv is inputs_q
        inputs_q = self._constrained(inputs_q, self._names("input", model_mode))
        if not same:
            inputs_kv = self._constrained(inputs_kv, self._names("input", model_mode))
        at = self._positions(inputs_q, inputs_positions, model_mode, start)
        q, k, v = self._heads(
            inputs_q, inputs_q if same else inputs_kv, at, rope_kwargs
        )
        q, k, v = (
            self._constrained(x, self._names(name, model_mode))
            for name, x in (("query", q), ("key", k), ("value", v))
        )
        if o.serves_vllm and model_mode != "train":
            rows, kv_cache = self.forward_serve_vllm(
                q, k, v, kv_cache, attention_metadata
            )
            y = rows.reshape(*q.shape[:2], *rows.shape[1:])
        else:
            ids, runs = decoder_segment_ids, bidirectional_mask
            y = self._attended(q, k, v, model_mode, start, (ids, runs, deterministic))
        y = checkpoint_name(y, "attention_out")
        y = self._constrained(y, self._names("out", model_mode))
        return self.out_projection(y, out_sharding), kv_cache

    def _attended(self, q, k, v, model_mode, start, rest):
        """By mode; ``rest`` is segment ids, bidirectional mask, deterministic."""
        segment_ids, bidirectional_mask, deterministic = rest
        if segment_ids is not None and segment_ids.shape != k.shape[:2]:
            raise ValueError(
                f"decoder_segment_ids {segment_ids.shape} must be (batch, length) of the "
                f"keys, {k.shape[:2]}."
            )
        if model_mode == "train":
            if segment_ids is not None and q.shape[1] != k.shape[1]:
                raise ValueError(
                    "decoder_segment_ids speak of queries and keys alike, so there must "
                    f"be as many; got {q.shape[1]} and {k.shape[1]}."
                )
            pair = None if segment_ids is None else (segment_ids, segment_ids)
            return self._attend_rows(q, k, v, pair, *rest[1:])
        if self.options.settings.ring_kv_cache:
            if bidirectional_mask is not None:
                raise Unsupported(
                    "a ring keeps the last keys alone, and a bidirectional_mask may ask "
                    "for others: build the layer without config.ring_kv_cache."
                )
            fresh = model_mode == "prefill" and not start
            return self._attend_ring(q, k, v, segment_ids, fresh, deterministic)
        if model_mode == "prefill":
            return self._prefill(q, k, v, segment_ids, start, *rest[1:])
        cache = self._updated(k, v, segment_ids, model_mode, start)
        return self._attend_cache(q, cache, *rest[1:])


Attention.__signature__ = signature_of(LayerOptions, rngs=None)  # type: ignore[attr-defined]


def _and(mask: Any, other: Any) -> Any:
    return other if mask is None else and_masks(mask, other)


def _real(shape: tuple[int, ...], segment_ids: jax.Array | None) -> jax.Array:
    return jnp.ones(shape, bool) if segment_ids is None else segment_ids == ACTIVE


def _check_mode(model_mode: str) -> None:
    if model_mode not in MODES:
        raise ValueError(
            f"Model Mode isn't supported! model_mode={model_mode!r} is not one of "
            f"{choices(MODES)}."
        )


def _check_call(inputs_q: jax.Array, model_mode: str, previous_chunk: Any) -> int:
    """How many tokens of this prompt are in the cache already."""
    _check_mode(model_mode)
    if inputs_q.ndim != 3:
        raise ValueError(f"inputs_q {inputs_q.shape} must be (batch, length, width).")
    if model_mode == "autoregressive" and inputs_q.shape[1] != 1:
        raise ValueError(
            "Sequence length should be 1 during autoregression, got "
            f"sequence={inputs_q.shape[1]}"
        )
    if previous_chunk is None:
        return 0
    if model_mode != "prefill":
        raise ValueError(
            f"previous_chunk is for prefill, not model_mode={model_mode!r}."
        )
    return previous_chunk.shape[1]
