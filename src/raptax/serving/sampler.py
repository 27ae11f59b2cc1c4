"""From logits to the next token."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._pytree import pytree


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
        """Checks the numbers first.

        Raises:
            ValueError: A number out of its range, or a limit on the choice when there
                is none to make because no temperature is given.
        """
        limits = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        _check("temperature", temperature, 0, math.inf)
        _check("top_k", top_k, 1, 2**31 - 1)
        _check("top_p", top_p, 0, 1)
        _check("min_p", min_p, 0, 1)
        if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty={repetition_penalty} must be above 0 and finite."
            )
        if not temperature:
            if given := [name for name, value in limits.items() if value is not None]:
                raise ValueError(
                    f"{', '.join(given)} choose among likely tokens, which needs a "
                    f"temperature above 0; got temperature={temperature}."
                )
            temperature = None
        return cls(temperature, top_k, top_p, min_p, repetition_penalty)

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
        logits = logits / self.temperature
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


def _check(name: str, value: int | float | None, low: int, high: int | float) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name}={value} must lie in [{low}, {high}].")
