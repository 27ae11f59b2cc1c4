"""From logits to the next token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._core.pytree import pytree

_TINY = float(np.finfo(np.float32).tiny)


@pytree
class Sampler:
    """Which token comes next. A temperature of None or 0 takes the likeliest.

    The steps, in this order, each skipped when it is None:

        repetition_penalty   logits of tokens seen before are divided by it when
                             positive and multiplied when negative (CTRL, Keskar et al.
                             2019, arXiv:1909.05858)
        temperature          divides the logits
        top_k                keeps the k likeliest tokens
        top_p                of those, keeps the fewest that hold this probability
                             together (Holtzman et al. 2019, arXiv:1904.09751)
        min_p                of those, keeps what is at least this fraction as likely as
                             the likeliest (Nguyen et al. 2024, arXiv:2407.01082)

    Tokens as likely as the last one kept are kept too. Numbers are leaves, so changing
    one compiles nothing anew; only which of them are None is structure.
    """

    temperature: float | Float[Array, ""] | None = None
    top_k: int | Int[Array, ""] | None = None
    top_p: float | Float[Array, ""] | None = None
    min_p: float | Float[Array, ""] | None = None
    repetition_penalty: float | Float[Array, ""] | None = None

    @classmethod
    def create(
        cls,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> "Sampler":
        """A sampler of numbers that `checked` finds in range."""
        return cls(temperature, top_k, top_p, min_p, repetition_penalty).checked()

    def checked(self) -> "Sampler":
        """The same with a temperature of 0 as None, if all numbers are in range.

        Raises:
            ValueError: A number out of its range, or a limit on the choice when there
                is none to make because no temperature is given.
        """
        # Below float32's smallest normal number a division overflows everywhere.
        _check("temperature", self.temperature, _TINY, math.inf, zero=True)
        _check("top_k", self.top_k, 1, 2**31 - 1, whole=True)
        _check("top_p", self.top_p, 0, 1)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 1e-30, 1e30)
        limits = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        given = [name for name, value in limits.items() if value is not None]
        greedy = self.temperature is None or bool(self.temperature == 0)
        if given and greedy:
            raise ValueError(
                f"{', '.join(given)} choose among likely tokens, which needs a "
                f"temperature above 0; got temperature={self.temperature}."
            )
        return dataclasses.replace(self, temperature=None) if greedy else self

    def __call__(
        self,
        logits: Float[Array, " V"],
        seen: Bool[Array, " V"],
        rng: Array,
    ) -> Int[Array, ""]:
        """Picks a token; ``seen`` marks those that occurred before."""
        if (penalty := self.repetition_penalty) is not None:
            penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
            logits = jnp.where(seen, penalised, logits)
        if self.temperature is None:
            return jnp.argmax(logits).astype(jnp.int32)
        # From the largest, so that no small temperature makes two of them infinite.
        logits = (logits - logits.max()) / self.temperature
        if self.top_k is not None or self.top_p is not None:
            logits = jnp.where(logits >= self._least(logits), logits, -jnp.inf)
        if self.min_p is not None:
            least = logits.max() + jnp.log(self.min_p)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return jax.random.categorical(rng, logits).astype(jnp.int32)

    def _least(self, logits: Float[Array, " V"]) -> Float[Array, ""]:
        """The smallest logit that ``top_k`` and then ``top_p`` keep."""
        best_first = -jnp.sort(-logits)
        kept = jnp.ones(logits.shape, bool)
        if self.top_k is not None:
            kept = best_first >= best_first[jnp.minimum(self.top_k, logits.size) - 1]
        if self.top_p is not None:
            p = jax.nn.softmax(jnp.where(kept, best_first, -jnp.inf))
            # The last ones' p may vanish beside the sum, which 1 is to keep all the same.
            kept &= (jnp.cumsum(p) - p < self.top_p) | (self.top_p >= 1)
            kept = kept.at[0].set(True)  # top_p = 0 keeps the likeliest
        return jnp.where(kept, best_first, jnp.inf).min()


def _check(name, value, low, high, *, whole=False, zero=False):
    if value is None:
        return
    number = np.asarray(value)
    kinds = (np.integer,) if whole else (np.integer, np.floating)
    if number.ndim or not any(jnp.issubdtype(number.dtype, kind) for kind in kinds):
        raise ValueError(
            f"{name}={value!r} must be a {'whole ' if whole else ''}number."
        )
    if not (low <= number <= high or (zero and number == 0)):
        least = f"be 0 or lie in [{low:.2g}" if zero else f"lie in [{low:.5g}"
        raise ValueError(f"{name}={value} must {least}, {high:.10g}].")
