"""Multi-head latent attention: one small vector per token in place of its heads.

DeepSeek-V2, arXiv:2405.04434, section 2.1. A token keeps a latent ``c`` of ``r`` numbers,
and ``e`` rotated ones that all heads share. Keys and values of head ``n`` follow by two
matrices: ``k = [c W_k[n], rope]`` and ``v = c W_v[n]``.

As ``q . (c W_k) = (q W_k^T) . c``, decoding needs neither keys nor values: with
`absorb_query` every head attends to the latents themselves, which is attention with one
kv head, of head size ``r + e``, whose values are the latents; `project_values` then
applies ``W_v``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def expand(
    heads: Float[Array, "B S N both"], rope: Float[Array, "B S 1 e"], nope: int
) -> tuple[Float[Array, "B S N D"], Float[Array, "B S N value"]]:
    """Keys and values of every head, from ``c [W_k, W_v]`` and the rotated part."""
    shared = jnp.broadcast_to(rope, (*heads.shape[:3], rope.shape[3]))
    return jnp.concatenate([heads[..., :nope], shared], axis=-1), heads[..., nope:]


def absorb_query(
    query: Float[Array, "B N T D"], w_k: Float[Array, "r N nope"]
) -> Float[Array, "B N T R"]:
    """``[q W_k^T, rope]``: the query of a head on latents."""
    nope = w_k.shape[2]
    plain = jnp.einsum("bntd,rnd->bntr", query[..., :nope], w_k.astype(query.dtype))
    return jnp.concatenate([plain, query[..., nope:]], axis=-1)


def project_values(
    latent: Float[Array, "B T N r"], w_v: Float[Array, "r N value"]
) -> Float[Array, "B T N value"]:
    """The values of each head, ``latent W_v``."""
    return jnp.einsum("btnr,rnd->btnd", latent, w_v.astype(latent.dtype))


def latent_keys(latent: jax.Array, rope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The one kv head's keys and values, ``(B, 1, S, r + e)`` and ``(B, 1, S, r)``."""
    return jnp.concatenate([latent, rope], axis=-1), latent
