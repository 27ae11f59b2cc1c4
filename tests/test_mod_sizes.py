"""Sizes that do not fit are refused; none of them is cut or clamped until it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raptax
from raptax import Causal, attention, create_block_mask, mods, varlen_attention
from raptax.api.varlen import _PackedMask
from raptax.kernels.cpu.library import missing_reason
from raptax.mods import check_mods

B, H, T, D = 3, 4, 6, 4
RNG = np.random.default_rng(0)
Q = jnp.asarray(RNG.normal(size=(B, H, T, D)), jnp.float32)
KERNELS = ["blockwise", *([] if missing_reason() else ["native"])]


def whole(*shape, most=4):
    return jnp.asarray(RNG.integers(0, most, shape), jnp.int32)


def floats(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


BY_SEQUENCE = {
    "Documents": lambda n: raptax.Documents(whole(n, T)),
    "Segments.query_ids": lambda n: raptax.Segments(whole(n, T), whole(1, T)),
    "Segments.key_ids": lambda n: raptax.Segments(whole(1, T), whole(n, T)),
    "Segments.query_start": lambda n: raptax.Segments(
        whole(1, T), whole(1, T), whole(n)
    ),
    "KeyRanges": lambda n: raptax.KeyRanges(whole(n, T), 3 + whole(n, T)),
    "BidirectionalSpans": lambda n: raptax.BidirectionalSpans(whole(n, T)),
    "KeyLengths": lambda n: raptax.KeyLengths(whole(n)),
    "QueryLengths": lambda n: raptax.QueryLengths(whole(n)),
    "PrefixLM": lambda n: raptax.PrefixLM(whole(n)),
    "Offset.q": lambda n: raptax.Offset(Causal(), q=whole(n)),
    "Offset.kv": lambda n: raptax.Offset(Causal(), kv=whole(n)),
    "Tree.ancestors": lambda n: raptax.Tree(whole(n, T, T) > 1),
    "Tree.start": lambda n: raptax.Tree(whole(1, T, T) > 1, whole(n)),
    "Dense": lambda n: raptax.Dense(whole(n, 1, T, T) > 1),
}
BY_HEAD = {
    "Dense": lambda n: raptax.Dense(whole(1, n, T, T) > 1),
    "PerHead": lambda n: raptax.PerHead((Causal(), ~Causal()), whole(n, most=2)),
}
SCORES_BY_SEQUENCE = {"DenseBias": lambda n: raptax.DenseBias(floats(n, 1, T, T))}
SCORES_BY_HEAD = {
    "DenseBias": lambda n: raptax.DenseBias(floats(1, n, 1, T)),
    "ALiBi": lambda n: raptax.ALiBi(floats(n)),
    "Temperature": lambda n: raptax.Temperature(floats(n)),
    "RelativeBias": lambda n: raptax.RelativeBias(floats(n, 7)),
    "T5Bias": lambda n: raptax.T5Bias(floats(8, n), max_distance=9),
}
ONE_PER_HEAD = {"PerHead", "ALiBi", "RelativeBias", "T5Bias"}  # 1 does not serve all
MASKS = [(B, *item) for item in BY_SEQUENCE.items()]
MASKS += [(H, *item) for item in BY_HEAD.items()]
SCORES = [(B, *item) for item in SCORES_BY_SEQUENCE.items()]
SCORES += [(H, *item) for item in SCORES_BY_HEAD.items()]

AROUND_MASKS = {
    "itself": lambda mod: mod,
    "and": lambda mod: Causal() & mod,
    "or": lambda mod: mod | (lambda b, h, q, k: q == k),
    "xor": lambda mod: Causal() ^ mod,
    "not": lambda mod: ~mod,
    "offset": lambda mod: raptax.Offset(mod, kv=1),
    "per head": lambda mod: raptax.PerHead((Causal(), mod), jnp.arange(H) % 2),
}
AROUND_SCORES = {
    "itself": lambda mod: mod,
    "composed": lambda mod: raptax.compose_score_mods(raptax.SoftCap(2.0), mod),
    "offset": lambda mod: raptax.Offset(mod, q=1),
}


@st.composite
def changes(draw, right):
    """Options of `attention` with a mod of a random kind, of a right or a wrong size."""
    masks = draw(st.booleans())
    size, name, build = draw(st.sampled_from(MASKS if masks else SCORES))
    fits = {size} if name in ONE_PER_HEAD else {1, size}
    sizes = fits if right else set(range(1, 9)) - fits
    mod = build(draw(st.sampled_from(sorted(sizes))))
    around = AROUND_MASKS if masks else AROUND_SCORES
    mod = around[draw(st.sampled_from(sorted(around)))](mod)
    if masks and draw(st.booleans()):
        return dict(score_mod=mods.MaskedScore(mod))
    return {"mask_mod" if masks else "score_mod": mod}


@settings(max_examples=60, deadline=None)
@given(changes(right=False))
def test_wrong_sizes_are_refused(options):
    with pytest.raises(ValueError, match=r"has shape .* and must have .* B=3 and H=4"):
        attention(Q, Q, Q, **options)
    with pytest.raises(ValueError, match="has shape"):
        jax.jit(lambda options: attention(Q, Q, Q, **options))(options)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=4, deadline=None)
@given(options=changes(right=True))
def test_right_sizes_agree_with_the_definition(kernel, options):
    expected = attention(Q, Q, Q, **options, kernel="reference")
    got = attention(Q, Q, Q, **options, kernel=kernel)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=3e-6)


@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_wrong_numbers_of_sequences_are_refused_everywhere(name, unchecked):
    mod, said = BY_SEQUENCE[name](2), f"{name.partition('.')[0]}.*has shape"
    with pytest.raises(ValueError, match=said):
        create_block_mask(mod, batch=B, seq_q=T, seq_kv=T)
    with pytest.raises(ValueError, match=said):
        mods.mask_mod_to_boolean_mask(mod, batch=B, num_heads=H, seq_q=T, seq_kv=T)
    rows, offsets = Q[0].swapaxes(0, 1), jnp.array([0, 1, 3, 6], jnp.int32)
    with pytest.raises(ValueError, match=said):
        varlen_attention(rows, rows, rows, row_offsets=offsets, mask_mod=mod)
    pages, lengths = jnp.ones((4, H, T, D)), jnp.ones(B, jnp.int32)
    with pytest.raises(ValueError, match=said):
        raptax.paged_attention(
            Q[:, :, 0],
            pages,
            pages,
            table=jnp.zeros((B, 1), jnp.int32),
            lengths=lengths,
            row_offsets=jnp.arange(B + 1, dtype=jnp.int32),
            mask_mod=mod,
        )
    made = create_block_mask(Causal(), seq_q=T, seq_kv=T, batch=B)
    object.__setattr__(made, "mask_mod", mod)
    with pytest.raises(ValueError, match=said):
        attention(Q, Q, Q, mask_mod=made)


@pytest.mark.parametrize(
    ("mod", "said"),
    [
        (raptax.T5Bias(floats(H, 8)), r"T5Bias.table has shape \(4, 8\) and must have"),
        (raptax.T5Bias(floats(H, 8)), r"\(buckets, H\).* Is it transposed"),
        (raptax.RelativeBias(floats(7, H)), r"shape \(7, 4\).* Is it transposed"),
        (raptax.RelativeBias(floats(H, 6)), r"shape \(4, 6\) and must have \(H, 2\*R"),
        (raptax.Dense(whole(T, T) > 0), r"Dense.allowed has shape \(6, 6\)"),
        (raptax.Documents(whole(T)), r"Documents.ids has shape \(6,\)"),
        (raptax.KeyRanges(whole(1, 6), whole(1, 5)), r"KeyRanges.stops has shape"),
        (raptax.Tree(whole(1, 5, 6) > 0), r"Tree.ancestors has shape \(1, 5, 6\)"),
        (raptax.Temperature(floats(1, H)), r"Temperature.factor has shape \(1, 4\)"),
        (floats(T, T), r"got an array of shape \(6, 6\). Give it as mask or bias"),
        (np.ones((T, T), bool), "got an array of shape"),
        ([Causal()], "must be callable; got"),
    ],
)
def test_what_is_wrong_is_said(mod, said, unchecked):
    names = ["score_mod"] if "Bias" in said or "Temp" in said else ["mask_mod"]
    with pytest.raises(ValueError, match=said):
        attention(Q, Q, Q, **dict.fromkeys(names, mod))


def test_a_choice_of_a_mask_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"which=\[0, 2\] must be between 0 and 1"):
        raptax.PerHead((Causal(), ~Causal()), jnp.array([0, 2]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(scale=jnp.ones(H)), r"scale must be one real number.*\(4,\)"),
        (dict(scale=jnp.ones(1)), r"scale must be one real number.*\(1,\)"),
        (dict(scale="1"), "scale must be one real number.*got '1'"),
        (dict(scale=True), "scale must be one real number.*got True"),
        (dict(scale=jnp.asarray(1j)), "scale must be one real number.*complex64"),
        (dict(sinks=jnp.ones(1)), r"sinks \(1,\) must be one number for each of 4"),
        (dict(sinks=jnp.ones(H, jnp.int32)), "sinks must be of floats.*int32"),
        (dict(query_start=whole(2)), r"query_start \(2,\) must be one number, or one"),
        (dict(query_start=whole(B, 1)), r"query_start \(3, 1\) must be one number"),
        (dict(query_start=1.5), "query_start must be of whole numbers"),
        (dict(key_lengths=whole(B + 1)), r"key_lengths \(4,\) must be one number for"),
        (dict(key_lengths=whole(1)), r"key_lengths \(1,\) must be one number for"),
        (dict(key_lengths=whole(B) + T), "must lie between 0 and 6"),
        (dict(key_lengths=floats(B)), "key_lengths must be of whole numbers"),
        (dict(query_lengths=whole(B + 1)), r"query_lengths \(4,\) must be one"),
        (dict(query_lengths=jnp.array([1, 2, -1])), r"\[1, 2, -1\] must lie between"),
        (dict(segment_ids=whole(B + 1, T)), "segment_ids"),
    ],
)
@pytest.mark.parametrize("kernel", [None, "reference"])
def test_options_of_a_wrong_size_are_refused(options, said, kernel, unchecked):
    with pytest.raises(ValueError, match=said):
        attention(Q, Q, Q, **options, kernel=kernel)


@pytest.mark.parametrize("name", ["reference", *KERNELS])
def test_kernels_check_where_queries_start(name, unchecked):
    (kernel,) = (kernel for kernel in raptax.KERNELS if kernel.name == name)
    with pytest.raises(ValueError, match=r"query_start \(2,\) must be"):
        kernel.run(Q, Q, Q, mask_mod=Causal(), query_start=whole(2))


@pytest.mark.parametrize(
    "offsets", [[0, 4, 2, 6], [1, 2, 3, 6], [0, 2, 3, 7], [2, 1, 3]], ids=str
)
def test_offsets_that_are_none_are_refused(offsets, unchecked):
    rows = Q[0].swapaxes(0, 1)
    good, wrong = jnp.zeros(len(offsets), jnp.int32), jnp.asarray(offsets, jnp.int32)
    with pytest.raises(ValueError, match=r"row_offsets=.* must start at 0, not decr"):
        varlen_attention(rows, rows, rows, row_offsets=wrong)
    with pytest.raises(ValueError, match=r"key_offsets=.* must start at 0, not decr"):
        varlen_attention(rows, rows, rows, row_offsets=good, key_offsets=wrong)
    with pytest.raises(ValueError, match=r"row_offsets \(\) must be one axis"):
        varlen_attention(rows, rows, rows, row_offsets=wrong[0], key_offsets=wrong[0])


def test_mods_of_packed_sequences_are_of_their_size():
    """Three sequences in one batch of rows: mods have three, the mask of rows has one."""
    rows, lengths = Q[0].swapaxes(0, 1), jnp.array([1, 1, 2], jnp.int32)
    offsets = jnp.array([0, 1, 3, 6], jnp.int32)
    out = varlen_attention(
        rows, rows, rows, row_offsets=offsets, mask_mod=raptax.KeyLengths(lengths)
    )
    for b, n in enumerate(lengths.tolist()):
        own = Q[:1, :, offsets[b] : offsets[b + 1]]
        alone = attention(own, own, own, mask_mod=raptax.KeyLengths(n))
        got = out[offsets[b] : offsets[b + 1]].swapaxes(0, 1)[None]
        np.testing.assert_allclose(got, alone, rtol=2e-5, atol=2e-6)
    _PackedMask(None, raptax.KeyLengths(lengths)).check_sizes(1, H)


def test_a_mod_of_ones_own_says_what_it_needs():
    class Odd:
        def check_sizes(self, batch, heads):
            if heads % 2 == 0:
                raise ValueError("only odd heads")

        def __call__(self, b_idx, h_idx, q_idx, kv_idx):
            return kv_idx <= q_idx

    check_mods([Odd(), Causal() & Odd()], 1, 3)
    for mod in (Odd(), Causal() & Odd()):
        with pytest.raises(ValueError, match="only odd heads"):
            attention(Q, Q, Q, mask_mod=mod)


def test_a_bias_of_packed_rows():
    rows, offsets = Q[0].swapaxes(0, 1), jnp.array([0, 1, 4, 6], jnp.int32)
    bias = floats(H, T, T)
    out = varlen_attention(rows, rows, rows, row_offsets=offsets, bias=bias)
    for first, last in ((0, 1), (1, 4), (4, 6)):
        own = Q[:1, :, first:last]
        near = bias[None, :, first:last, first:last]
        alone = attention(own, own, own, bias=near, mask_mod=Causal())
        got = out[first:last].swapaxes(0, 1)[None]
        np.testing.assert_allclose(got, alone, rtol=2e-5, atol=2e-6)


def test_a_bias_of_packed_rows_has_three_axes(unchecked):
    rows, offsets = Q[0].swapaxes(0, 1), jnp.array([0, 6], jnp.int32)
    for shape, said in (
        ((1, H, T, T), r"bias \(1, 4, 6, 6\) must broadcast to \(heads, rows, keys\)"),
        ((T, T), r"bias \(6, 6\) must broadcast to \(heads, rows, keys\)"),
        ((H, T, 3), "bias .* must broadcast to"),
    ):
        with pytest.raises(ValueError, match=said):
            varlen_attention(
                rows, rows, rows, row_offsets=offsets, bias=jnp.zeros(shape)
            )
