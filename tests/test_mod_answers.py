"""What functions given as mods may return, and what is no mod at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raptax
from raptax import Causal, SoftCap, attention, create_block_mask
from raptax._core.errors import check_dropout
from raptax.block_mask import EMPTY, FULL
from raptax.kernels.cpu.library import missing_reason

B, H, T, D = 2, 2, 6, 4
Q = jnp.asarray(np.random.default_rng(0).normal(size=(B, H, T, D)), jnp.float32)
KERNELS = ["reference", "blockwise", *([] if missing_reason() else ["native"])]


def always(value):
    return lambda *at: value


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_may_return_one_answer_for_all(kernel):
    for yes in (True, np.array(True)):
        got = attention(Q, Q, Q, mask_mod=always(yes), kernel=kernel)
        np.testing.assert_allclose(got, attention(Q, Q, Q), rtol=2e-5, atol=2e-6)
    no = always(False)
    assert (attention(Q, Q, Q, mask_mod=no, kernel=kernel) == 0).all()
    for mask, like in (
        (Causal() & always(True), Causal()),
        (Causal() | no, Causal()),
        (~(~Causal() | no), Causal()),
        (Causal() ^ always(True), ~Causal()),
    ):
        got = attention(Q, Q, Q, mask_mod=mask, kernel=kernel)
        expected = attention(Q, Q, Q, mask_mod=like, kernel="reference")
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    negated = ~raptax.and_masks(no)
    got = attention(Q, Q, Q, mask_mod=negated, kernel=kernel)
    np.testing.assert_allclose(got, attention(Q, Q, Q), rtol=2e-5, atol=2e-6)


def test_tiles_of_one_answer_for_all():
    for answer, kind in ((True, FULL), (False, EMPTY)):
        made = create_block_mask(always(answer), seq_q=T, seq_kv=T, block=2)
        assert made.block == (2, 2)
        assert (made.kinds == kind).all()
    whole = raptax.mask_mod_to_boolean_mask(
        always(True), batch=1, num_heads=1, seq_q=2, seq_kv=3
    )
    assert whole.shape == (1, 1, 2, 3)


WRONG = {
    "NoneType": always(None),
    "int": always(1),
    "int32": lambda b, h, q, k: q,
    "float": always(0.5),
    "list": always([True]),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kernel", [None, "reference", "blockwise"])
def test_a_mask_that_returns_no_booleans_is_refused(name, kernel):
    said = f"must return booleans, True where .* it returned {name}"
    around = (
        lambda m: m,
        lambda m: Causal() & m,
        lambda m: ~raptax.or_masks(m),
        lambda m: raptax.Offset(m, q=1),
        lambda m: raptax.PerHead((Causal(), m), jnp.array([0, 1])),
    )
    for wrap in around:
        with pytest.raises(ValueError, match=said):
            attention(Q, Q, Q, mask_mod=wrap(WRONG[name]), kernel=kernel)
    with pytest.raises(ValueError, match=said):
        create_block_mask(WRONG[name], seq_q=T, seq_kv=T)
    rows = Q[0].swapaxes(0, 1)
    offsets = jnp.array([0, 2, T], jnp.int32)
    with pytest.raises(ValueError, match=said):
        raptax.varlen_attention(
            rows, rows, rows, row_offsets=offsets, mask_mod=WRONG[name], kernel=kernel
        )


@pytest.mark.parametrize(
    ("mod", "said"),
    [
        (always(0.0), "it returned float"),
        (always(None), "it returned NoneType"),
        (lambda s, *_: s.astype(jnp.bfloat16), "it returned bfloat16"),
        (lambda s, *_: s[0], r"it returned float32 \(2, 6, 6\)"),
        (lambda s, *_: s > 0, "it returned bool"),
    ],
)
@pytest.mark.parametrize("kernel", [None, "reference", "blockwise"])
def test_a_score_change_that_returns_no_scores_is_refused(mod, said, kernel):
    for change in (mod, raptax.compose_score_mods(SoftCap(2.0), mod, SoftCap(3.0))):
        with pytest.raises(
            ValueError, match=f"must return scores as they came.*{said}"
        ):
            attention(Q, Q, Q, score_mod=change, kernel=kernel)


@pytest.mark.parametrize("combine", [raptax.and_masks, raptax.or_masks])
def test_masks_of_nothing_are_refused(combine, unchecked):
    name = combine.__name__
    for masks in ((), (None,), (Causal(), None)):
        with pytest.raises(ValueError, match=f"{name} must be given masks, at least"):
            combine(*masks)
    for wrong, said in (
        (3, "callable; got 3"),
        (jnp.ones((T, T), bool), "an array of"),
    ):
        with pytest.raises(ValueError, match=said):
            combine(Causal(), wrong)
    assert combine(Causal()) == Causal()


def test_masks_of_ones_own_types_combine():
    @raptax._core.pytree.pytree
    class Mine:
        size: int

        def __call__(self, b_idx, h_idx, q_idx, kv_idx):
            return kv_idx < self.size

    both = raptax.and_masks(Mine(3), Mine(2))
    expected = attention(Q, Q, Q, mask_mod=raptax.KeyLengths(2), kernel="reference")
    np.testing.assert_allclose(
        attention(Q, Q, Q, mask_mod=both), expected, rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("wrong", [3, "cap", [SoftCap(2.0)], jnp.ones((T, T))])
def test_composed_nonsense_is_refused(wrong, unchecked):
    with pytest.raises(ValueError, match="a mask_mod or score_mod must be"):
        raptax.compose_score_mods(SoftCap(2.0), wrong)
    with pytest.raises(ValueError, match="a mask_mod or score_mod must be"):
        raptax.compose_score_mods(wrong)


def test_a_traced_rate_is_taken_on_trust():
    key = jax.random.key(0)

    @jax.jit
    def check(rate):
        check_dropout(key, rate, deterministic=False)
        check_dropout(None, rate, deterministic=True)
        with pytest.raises(ValueError, match="needs a dropout_rng"):
            check_dropout(None, rate, deterministic=False)
        return rate

    assert check(0.5) == 0.5
    for wrong in (jnp.ones(2), "1", True, jnp.asarray(1j)):
        with pytest.raises(ValueError, match="dropout_rate must be one real number"):
            check_dropout(key, wrong, deterministic=False)
    with pytest.raises(ValueError, match=r"dropout_rate=1\.5 must lie in"):
        check_dropout(key, jnp.asarray(1.5), deterministic=False)


def test_no_heads(unchecked):
    with pytest.raises(ValueError, match="kv_heads=0 must be at least 1"):
        attention(Q, Q[:, :0], Q[:, :0])
    assert attention(Q[:, :0], Q, Q).shape == (B, 0, T, D)


def test_tiles_for_any_number_of_sequences_and_heads(unchecked):
    made = create_block_mask(
        Causal(), batch=None, heads=None, seq_q=T, seq_kv=T, block=[4, 2]
    )
    assert (made.batch, made.heads, made.block) == (None, None, (4, 2))
    got = attention(Q, Q, Q, mask_mod=made)
    expected = attention(Q, Q, Q, mask_mod=Causal(), kernel="reference")
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    for name, mask in (
        ("batch", lambda b, h, q, k: k <= q + b),
        ("heads", lambda b, h, q, k: k <= q + h),
    ):
        with pytest.raises(ValueError, match=f"depends on the index of {name}"):
            create_block_mask(mask, batch=None, heads=None, seq_q=T, seq_kv=T)
    with pytest.raises(ValueError, match=r"KeyLengths\.lengths has shape"):
        create_block_mask(
            raptax.KeyLengths(jnp.array([1, 2])), batch=None, seq_q=T, seq_kv=T
        )
    for block in (0, (4,), (4, 0)):
        with pytest.raises(
            ValueError, match=r"must be .queries, keys., each at least 1"
        ):
            create_block_mask(Causal(), seq_q=T, seq_kv=T, block=block)
