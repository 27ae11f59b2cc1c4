"""Text from a model, token by token, with the loop over tokens on the device."""

import dataclasses
import functools
import operator
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..kv_cache import PageAllocator, PagedKVCache
from ..models.decoder import Decoder
from ..models.language_model import LanguageModel
from ..models.tokenizer import Tokenizer
from .prompt import Ids, Prompt, checked_ids, checked_stops, ids_of, until
from .sampler import Sampler

PREFILL_ROWS = 512  # of a prompt at once: bounds the memory that prefill takes
DECODE_STEPS = 8  # tokens per call to the device: the text arrives in such portions
GREEDY = Sampler()


def generate(
    model: LanguageModel,
    prompt: Prompt,
    *,
    max_tokens: SupportsIndex = 128,
    sampler: Sampler = GREEDY,
    seed: SupportsIndex | None = 0,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """Continues ``prompt``, and yields the text as it comes.

    Args:
        model: What `raptax.models.load` returns.
        prompt: Text; token ids as `Tokenizer.encode` gives them, in a sequence or an
            array; or messages for `Tokenizer.encode_chat`. One prompt, not several.
        max_tokens: Stop after this many tokens, if the model has not ended before.
        sampler: How to pick tokens.
        seed: Of the sampler, below 2**32; None takes another one each time. The text
            depends on it, not on how the work is cut.
        stop: Strings that end the text where they occur; they are not part of it.

    Raises:
        ValueError: The prompt is empty, of another kind, or too long for the model's
            context, or a number is out of range.
    """
    stops = checked_stops(stop)
    ids = ids_of(prompt, model.tokenizer)
    tokens = generate_ids(
        model.decoder,
        ids,
        max_tokens=max_tokens,
        sampler=sampler,
        seed=seed,
        stop=model.tokenizer.stop_ids,
    )
    return until(text_of(tokens, model.tokenizer, ids), stops)


def text_of(
    tokens: Iterable[int], tokenizer: Tokenizer, prompt: Sequence[int] = ()
) -> Iterator[str]:
    """Tokens after ``prompt`` as text: whole characters, without the stop token."""
    stream = tokenizer.stream(prompt)
    for token in tokens:
        if token not in tokenizer.stop_ids and (piece := stream.push(token)):
            yield piece
    if rest := stream.finish():
        yield rest


def generate_ids(
    decoder: Decoder,
    prompt: Ids,
    *,
    max_tokens: SupportsIndex,
    sampler: Sampler = GREEDY,
    seed: SupportsIndex | None = 0,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """The token ids of `generate`; one of ``stop``, if it comes, is the last."""
    ids = checked_ids(prompt)
    tokens, number = check_numbers(
        max_tokens, secrets.randbits(32) if seed is None else seed
    )
    check_prompt(ids, tokens, decoder.config)
    return _Run(decoder, ids, tokens, sampler.checked(), number, stop).tokens()


def check_numbers(max_tokens: Any, seed: Any) -> tuple[int, int]:
    """Both as ints; raises ValueError unless they are whole and in range."""
    tokens, number = _whole("max_tokens", max_tokens), _whole("seed", seed)
    if tokens < 1:
        raise ValueError(f"max_tokens={tokens} must be at least 1.")
    if not 0 <= number < 2**32:  # JAX would drop the higher bits
        raise ValueError(f"seed={number} must lie in [0, 2**32).")
    return tokens, number


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={value!r} must be a whole number.")
    return operator.index(value)


def check_prompt(prompt: Sequence[int], max_tokens: int, config: Any) -> None:
    """Raises ValueError unless the prompt is sound and its answer fits the context."""
    if not prompt:
        raise ValueError("the prompt has no tokens; a model needs at least one.")
    if bad := [i for i in prompt if not 0 <= i < config.vocab_size]:
        raise ValueError(
            f"token ids must lie in [0, {config.vocab_size}); got {bad[:5]}."
        )
    if len(prompt) + max_tokens > config.max_position:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {max_tokens} more exceed the model's "
            f"context of {config.max_position}; shorten the prompt or max_tokens."
        )


@dataclasses.dataclass
class _Run:
    """One prompt being continued: the cache and its pages, the sampler's state."""

    decoder: Decoder
    prompt: Sequence[int]
    max_tokens: int
    sampler: Sampler
    seed: int
    stop: frozenset[int]

    def __post_init__(self) -> None:
        params = self.decoder.config.kv_params(self.decoder.kv_dtype)
        needed = len(self.prompt) + self.max_tokens
        pages = _power_of_two(-(-needed // params.page_size))
        self.graph, self.state = nnx.split(self.decoder)
        cache = PagedKVCache.create(params, pages=pages, sequences=1, max_pages=pages)
        held: list[int] = []
        PageAllocator(pages, params.page_size).grow(held, needed)
        self.cache = cache.with_tables([held], [0])
        seen = np.zeros(self.decoder.config.vocab_size, bool)
        seen[list(self.prompt)] = True
        self.seen = jnp.asarray(seen)
        self.stops = jnp.asarray(sorted(self.stop) or [-1], jnp.int32)

    def tokens(self) -> Iterator[int]:
        """Prefills, then decodes a portion at a time."""
        left = self.max_tokens - 1
        if left:  # compiled now, so that no pause follows the first token
            self._decode(jnp.zeros((), jnp.int32), 0)
        token = self._prefill()
        yield int(token)
        while left and int(token) not in self.stop:
            token, new = self._decode(token, min(left, DECODE_STEPS))
            yield from new
            left -= len(new)

    def _decode(self, token: jax.Array, steps: int) -> tuple[jax.Array, list[int]]:
        """Up to ``steps`` tokens after ``token``: the last of them, and all."""
        self.cache, self.seen, token, tokens, count = decode(
            self.graph,
            self.state,
            self.cache,
            self.seen,
            token,
            steps=jnp.asarray(steps, jnp.int32),
            sampler=self.sampler,
            rng=jax.random.key(self.seed),
            stops=self.stops,
        )
        return token, tokens[: int(count)].tolist()

    def _prefill(self) -> jax.Array:
        """Takes in the prompt in chunks; returns the first new token."""
        for start in range(0, len(self.prompt), PREFILL_ROWS):
            chunk = self.prompt[start : start + PREFILL_ROWS]
            rows = np.zeros(_power_of_two(max(16, len(chunk))), np.int32)
            rows[: len(chunk)] = chunk
            self.cache, logits = prefill(
                self.graph,
                self.state,
                self.cache,
                jnp.asarray(rows),
                jnp.asarray([0, len(chunk)], jnp.int32),
            )
        rng = jax.random.fold_in(jax.random.key(self.seed), len(self.prompt))
        token = jax.jit(Sampler.__call__)(self.sampler, logits[0], self.seen, rng)
        self.seen = self.seen.at[token].set(True)
        return token


def _power_of_two(n: int) -> int:
    """The next one: so that few shapes, hence few programs, are ever compiled."""
    return 1 << (n - 1).bit_length()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(graph, state, cache, tokens, row_offsets):
    """Takes in packed (ragged) tokens: the cache and the logits after each one's last."""
    logits, cache = nnx.merge(graph, state)(
        tokens, cache, row_offsets=row_offsets, logit_rows=row_offsets[1:] - 1
    )
    return cache, logits


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def decode(graph, state, cache, seen, token, *, steps, sampler, rng, stops):
    """Up to ``steps`` tokens after ``token``, fewer if one of ``stops`` comes.

    Returns the cache, what has been seen, the last token, all new ones and their count.
    """

    def more(carry):
        _, _, token, _, count = carry
        return (count < steps) & ((count == 0) | ~jnp.any(token == stops))

    def step(carry):
        cache, seen, token, tokens, count = carry
        # Ties the weights to the loop: XLA would unpack them all once, ahead of it.
        weights, token = jax.lax.optimization_barrier((state, token))
        logits, cache = nnx.merge(graph, weights)(
            token[None], cache, row_offsets=jnp.arange(2, dtype=jnp.int32)
        )
        at = jax.random.fold_in(rng, cache.lengths[0])
        token = sampler(logits[0], seen, at)
        seen, tokens = seen.at[token].set(True), tokens.at[count].set(token)
        return cache, seen, token, tokens, count + 1

    tokens = jnp.zeros(DECODE_STEPS, jnp.int32)
    carry = cache, seen, token, tokens, jnp.asarray(0, jnp.int32)
    return jax.lax.while_loop(more, step, carry)
