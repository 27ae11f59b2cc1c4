"""The sampler's steps against its docstring in numpy, and what it really draws."""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from raptax.generate import Sampler

NONE_SEEN = np.zeros(5, bool)
THREE_TIE, THIRDS = [1, 3, 3, 0, 3], np.array([0, 1, 1, 0, 1]) / 3
WARM = functools.partial(Sampler.create, temperature=1.0)


def expected(sampler, logits, seen):
    """The probabilities that the sampler's docstring gives, in float64."""
    logits = np.asarray(logits, np.float64)
    if (penalty := sampler.repetition_penalty) is not None:
        lowered = np.where(logits > 0, logits / penalty, logits * penalty)
        logits = np.where(seen, lowered, logits)
    if sampler.temperature is None:
        return np.eye(len(logits))[np.argmax(logits)]
    p = softmax(logits / sampler.temperature)
    if (k := sampler.top_k) is not None:
        p = keep(p, sorted(p)[::-1][: int(k)][-1])
    if sampler.top_p is not None:
        best_first = sorted(p)[::-1]
        held = itertools.accumulate(best_first)
        enough = (n for n, mass in enumerate(held) if mass >= sampler.top_p - 1e-9)
        p = keep(p, best_first[next(enough)])
    if sampler.min_p is not None:
        p = keep(p, sampler.min_p * p.max())
    return p


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def keep(p, least):
    """Those as likely as ``least``, made to sum to 1; equal up to rounding counts."""
    p = np.where(p >= least * (1 - 1e-6), p, 0)
    return p / p.sum()


@pytest.fixture
def probabilities(monkeypatch):
    """What the sampler would draw from, exactly: it draws last, from its logits."""
    drawn_from = []

    def categorical(rng, logits):
        drawn_from.append(logits)
        return jnp.argmax(logits)

    monkeypatch.setattr(jax.random, "categorical", categorical)

    def told(sampler, logits, seen=NONE_SEEN):
        drawn_from.clear()
        token = sampler(
            jnp.asarray(logits, jnp.float32), jnp.asarray(seen), jax.random.key(0)
        )
        assert (token.shape, token.dtype) == ((), jnp.int32)
        if not drawn_from:
            return np.eye(len(logits))[int(token)]
        return softmax(np.asarray(drawn_from[0], np.float64))

    return told


L = math.log
BEST_TWO = [0, 5 / 8, 0, 0, 3 / 8]
HALVES = [L(0.05), L(0.5), L(0.1), L(0.05), L(0.3)]  # logits of these probabilities
CASES = {
    "greedy": (Sampler(), HALVES, [0, 1, 0, 0, 0]),
    "greedy, first of a tie": (Sampler(), THREE_TIE, [0, 1, 0, 0, 0]),
    "temperature 0": (Sampler.create(temperature=0.0), HALVES, [0, 1, 0, 0, 0]),
    "temperature 1": (WARM(), HALVES, [0.05, 0.5, 0.1, 0.05, 0.3]),
    "temperature 1/2": (
        Sampler.create(temperature=0.5),
        [L(1), L(2), L(3), L(4), L(5)],
        np.array([1, 4, 9, 16, 25]) / 55,
    ),
    "top_k 1 is greedy": (WARM(top_k=1), HALVES, [0, 1, 0, 0, 0]),
    "top_k 2": (WARM(top_k=2), HALVES, BEST_TWO),
    "top_k keeps a tie": (WARM(top_k=4), HALVES, [0.05, 0.5, 0.1, 0.05, 0.3]),
    "top_k 1 keeps a tie": (WARM(top_k=1), THREE_TIE, THIRDS),
    "top_k beyond all": (WARM(top_k=99), HALVES, [0.05, 0.5, 0.1, 0.05, 0.3]),
    "top_p 0 is greedy": (WARM(top_p=0.0), HALVES, [0, 1, 0, 0, 0]),
    "top_p below the best": (WARM(top_p=0.4), HALVES, [0, 1, 0, 0, 0]),
    "top_p takes one more": (WARM(top_p=0.6), HALVES, BEST_TWO),
    "top_p keeps a tie": (WARM(top_p=0.92), HALVES, [0.05, 0.5, 0.1, 0.05, 0.3]),
    "top_p 1": (WARM(top_p=1.0), HALVES, [0.05, 0.5, 0.1, 0.05, 0.3]),
    "min_p 0": (WARM(min_p=0.0), HALVES, [0.05, 0.5, 0.1, 0.05, 0.3]),
    "min_p": (WARM(min_p=0.3), HALVES, BEST_TWO),
    "min_p 1 is greedy": (WARM(min_p=1.0), HALVES, [0, 1, 0, 0, 0]),
    "min_p 1 keeps a tie": (WARM(min_p=1.0), THREE_TIE, THIRDS),
    # of the two that top_k leaves, the first holds 5/8
    "top_k before top_p": (WARM(top_k=2, top_p=0.6), HALVES, [0, 1, 0, 0, 0]),
    # the tie at the end of top_k counts: the best holds 0.5 of all five, not 0.53
    "top_p counts top_k's tie": (WARM(top_k=4, top_p=0.51), HALVES, BEST_TWO),
    "temperature before top_p": (
        Sampler.create(temperature=0.5, top_p=0.6),
        HALVES,
        [0, 1, 0, 0, 0],  # squared, the best holds 0.7
    ),
    "temperature before min_p": (
        Sampler.create(temperature=0.5, min_p=0.37),  # squared, 0.3 is 0.36 of 0.5
        HALVES,
        [0, 1, 0, 0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sampler", "logits", "want"), CASES.values(), ids=CASES)
def test_each_step(probabilities, sampler, logits, want):
    np.testing.assert_allclose(probabilities(sampler, logits), want, atol=1e-6)
    numpy = expected(sampler, logits, NONE_SEEN)
    np.testing.assert_allclose(numpy, want, atol=1e-9)


def test_repetition_penalty(probabilities):
    """Makes what was seen less likely, whatever the sign of its logit."""
    logits, seen = [2.0, -2.0, 0.0, 2.0, -2.0], np.array([1, 1, 1, 0, 0], bool)
    sampler = Sampler.create(temperature=1.0, repetition_penalty=4.0)
    want = softmax(np.array([0.5, -8.0, 0.0, 2.0, -2.0]))
    np.testing.assert_allclose(probabilities(sampler, logits, seen), want, atol=1e-6)
    # before the temperature, though dividing by both in turn would not show it
    sampler = Sampler.create(temperature=0.5, repetition_penalty=4.0)
    want = softmax(np.array([1.0, -16.0, 0.0, 4.0, -4.0]))
    np.testing.assert_allclose(probabilities(sampler, logits, seen), want, atol=1e-6)
    sampler = Sampler.create(repetition_penalty=4.0)  # greedy choices change as well
    assert probabilities(sampler, logits, seen).argmax() == 3
    # and before the limits: 0 and 3 would tie without it
    sampler = WARM(top_k=1, repetition_penalty=1.01)
    assert probabilities(sampler, logits, seen).argmax() == 3


@pytest.mark.parametrize("seed", range(60))
def test_all_steps_together(probabilities, seed):
    rng = np.random.default_rng(seed)
    numbers = {
        "temperature": rng.choice([0.3, 1.0, 1.7]),
        "top_k": int(rng.integers(1, 12)),
        "top_p": rng.choice([0.05, 0.5, 0.9, 1.0]),
        "min_p": rng.choice([0.0, 0.02, 0.2]),
        "repetition_penalty": rng.choice([0.7, 1.0, 1.3]),
    }
    given = {
        name: value if isinstance(value, int) else float(value)
        for name, value in numbers.items()
        if name == "temperature" or rng.random() < 0.6
    }
    sampler = Sampler.create(**given)
    logits = rng.normal(size=9) * 3
    logits[rng.integers(0, 9, 3)] = logits[0]  # ties
    seen = rng.random(9) < 0.3
    got = probabilities(sampler, logits, seen)
    want = expected(sampler, logits.astype(np.float32), seen)
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=str(sampler))


def test_top_p_1_keeps_all_however_unlikely(probabilities):
    logits = np.array([0.0, -20.0, -40.0, -60.0, -80.0])
    kept = probabilities(WARM(top_p=1.0), logits)
    np.testing.assert_allclose(kept, softmax(logits), rtol=1e-5)


# What is drawn


def chi_square(counts, p):
    """The statistic, and what it exceeds once in a million if ``p`` is right."""
    assert counts[p == 0].sum() == 0
    counts, p = counts[p > 0], p[p > 0]
    wanted = counts.sum() * p
    return ((counts - wanted) ** 2 / wanted).sum(), stats.chi2.isf(1e-6, len(p) - 1)


DRAWS = 20_000


@pytest.mark.parametrize(
    "given",
    [
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=7),
        dict(temperature=1.0, top_p=0.8),
        dict(temperature=1.5, min_p=0.1, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(given):
    sampler = Sampler.create(**given)
    logits = np.linspace(-2, 1, 11)[np.random.default_rng(0).permutation(11)]
    seen = np.arange(11) % 3 == 0
    draw = jax.jit(jax.vmap(sampler, (None, None, 0)))
    keys = jax.random.split(jax.random.key(3), DRAWS)
    tokens = draw(jnp.asarray(logits, jnp.float32), jnp.asarray(seen), keys)
    counts = np.bincount(tokens, minlength=11)
    p = expected(sampler, logits, seen)
    statistic, bound = chi_square(counts, p)
    assert statistic < bound
    # A temperature off by a tenth, the smallest slip one would make, does not pass.
    off = np.where(p > 0, p, 1) ** 1.1 * (p > 0)
    statistic, bound = chi_square(counts, off / off.sum())
    assert statistic > bound


def test_the_same_key_draws_the_same():
    logits, seen = jnp.zeros(1000), jnp.zeros(1000, bool)
    one, again, other = (
        int(WARM()(logits, seen, jax.random.key(seed))) for seed in (1, 1, 2)
    )
    assert one == again != other


# Numbers


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(temperature=-0.1), r"temperature=-0.1 must be 0 or lie in \[1.2e-38"),
        (dict(temperature=1e-39), "temperature=1e-39 must be 0 or lie in"),
        (dict(temperature="1"), "temperature='1' must be a number"),
        (dict(temperature=True), "temperature=True must be a number"),
        (dict(temperature=1.0, top_k=2.5), "top_k=2.5 must be a whole number"),
        (dict(temperature=1.0, top_p=[0.5]), r"top_p=\[0.5\] must be a number"),
        (dict(temperature=math.nan), "temperature=nan"),
        (dict(temperature=1.0, top_k=0), "top_k=0 must lie in"),
        (dict(temperature=1.0, top_k=-1), "top_k=-1"),
        (dict(temperature=1.0, top_k=2**31), "top_k=2147483648"),
        (dict(temperature=1.0, top_p=1.01), r"top_p=1.01 must lie in \[0, 1\]"),
        (dict(temperature=1.0, top_p=-0.1), "top_p=-0.1"),
        (dict(temperature=1.0, top_p=math.nan), "top_p=nan"),
        (dict(temperature=1.0, min_p=1.5), "min_p=1.5"),
        (dict(temperature=1.0, min_p=-1.0), "min_p=-1.0"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0 must lie in"),
        (dict(repetition_penalty=-2.0), "repetition_penalty=-2.0"),
        (dict(repetition_penalty=math.nan), "repetition_penalty=nan"),
        (dict(repetition_penalty=math.inf), "repetition_penalty=inf"),
        (dict(top_k=5), "top_k choose among .* got temperature=None"),
        (dict(temperature=0.0, top_p=0.5, min_p=0.1), "top_p, min_p choose"),
    ],
)
def test_numbers_out_of_range(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampler.create(**given)
    with pytest.raises(ValueError, match=sentence):
        Sampler(**given).checked()  # which `generate` asks for


def test_ends_of_the_ranges_are_allowed():
    for temperature in (0.01, 1.0, 100.0):
        Sampler.create(temperature=temperature, top_k=1, top_p=0.0, min_p=0.0)
        Sampler.create(temperature=temperature, top_k=10**6, top_p=1.0, min_p=1.0)
    assert Sampler.create(temperature=0.0) == Sampler.create() == Sampler()


def test_a_temperature_near_0_takes_the_likeliest():
    logits, seen = jnp.asarray([1.0, 9.0, 8.999, -3.0]), jnp.zeros(4, bool)
    for temperature in (1.2e-38, 1e-30, 1e-9):
        sampler = Sampler.create(temperature=temperature)
        drawn = {int(sampler(logits, seen, jax.random.key(n))) for n in range(20)}
        assert drawn == {1}


def test_a_number_compiles_nothing_anew():
    traces = []

    @jax.jit
    def sample(sampler, logits, seen, rng):
        traces.append(sampler)
        return sampler(logits, seen, rng)

    rest = jnp.arange(5.0), jnp.zeros(5, bool), jax.random.key(0)
    names = inspect.signature(Sampler.create).parameters
    one = dict(zip(names, (0.5, 2, 0.9, 0.1, 1.1), strict=True))
    other = dict(zip(names, (1.5, 4, 0.2, 0.0, 0.9), strict=True))
    sample(Sampler.create(**one), *rest)
    for name in names:
        sample(Sampler.create(**{**one, name: other[name]}), *rest)
    assert len(traces) == 1
    for number, name in enumerate(list(names)[1:], 2):
        sample(Sampler.create(**{**one, name: None}), *rest)
        sample(Sampler.create(**{**other, name: None}), *rest)
        assert len(traces) == number
    sample(Sampler.create(), *rest)
    assert len(traces) == 6
