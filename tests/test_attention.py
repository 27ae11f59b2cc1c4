"""`attention`, `explain` and their checks of arguments."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raptax
from raptax import Causal, SoftCap, Unsupported, attention, explain, paged_attention
from raptax.kernels.cpu import library as native


def qkv(q=(1, 4, 6, 8), k=(1, 2, 6, 8), v=(1, 2, 6, 8), dtype=jnp.float32):
    return [jnp.ones(shape, dtype) for shape in (q, k, v)]


def answers(*arrays, **options) -> dict[str, str]:
    """What each kernel says, by its name."""
    lines = explain(*arrays, **options).splitlines()
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def test_the_choice_never_changes_what():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in qkv())
    chosen = attention(q, k, v, mask_mod=Causal())
    for kernel in raptax.KERNELS:
        named = attention(q, k, v, mask_mod=Causal(), kernel=kernel.name)
        np.testing.assert_allclose(named, chosen, rtol=0, atol=1e-6)


def test_naming_a_kernel_turns_cannot_into_an_error():
    with pytest.raises(
        Unsupported, match=r"kernel='jax_nn' cannot run this: it knows no score_mod\."
    ):
        attention(*qkv(), score_mod=SoftCap(1.0), kernel="jax_nn")
    with pytest.raises(
        ValueError,
        match="'flash' is not one of 'native', 'jax_nn', 'blockwise', 'reference'",
    ):
        attention(*qkv(), kernel="flash")


def test_explain_says_what_each_kernel_answers():
    told = answers(*qkv(), score_mod=SoftCap(1.0))
    assert list(told) == [k.name for k in raptax.KERNELS]
    assert told["jax_nn"] == "cannot: it knows no score_mod"
    first = "native" if native.available() else "blockwise"
    assert [name for name in told if told[name] == "runs"] == [first]
    assert told["reference"].startswith("only when named")
    named = answers(*qkv(), kernel="reference")
    assert [name for name in named if named[name] == "runs"] == ["reference"]
    with pytest.raises(ValueError, match="'flash' is not one of"):
        explain(*qkv(), kernel="flash")


LACKS = {  # of jax_nn; the other kernels lack nothing
    "no score_mod": dict(score_mod=SoftCap(1.0)),
    "bias is -inf": dict(bias=jnp.zeros((1, 1, 1, 6))),
    "no sinks": dict(sinks=jnp.zeros(4)),
    "log-sum-exp": dict(return_lse=True),
    "the mean of the values": dict(mask=jnp.ones((1, 1, 6, 6), bool)),
    "no dropout": dict(
        dropout_rng=jax.random.key(0), dropout_rate=0.5, deterministic=False
    ),
    "not Not": dict(mask_mod=~Causal()),
    "not BlockMask": dict(
        mask_mod=raptax.create_block_mask(Causal(), seq_q=6, seq_kv=6)
    ),
    "not Segments": dict(segment_ids=jnp.zeros((1, 6), jnp.int32)),
    "not KeyLengths": dict(key_lengths=jnp.array([3], jnp.int32)),
    "not QueryLengths": dict(query_lengths=jnp.array([3], jnp.int32)),
    "no query_start": dict(mask_mod=Causal(), query_start=0),
    "a number, not an array": dict(scale=jnp.float32(0.5)),
}


@pytest.mark.parametrize("said", LACKS)
def test_what_a_kernel_lacks_it_says(said):
    """Named, it raises; asked, it tells; left alone, another one runs."""
    with pytest.raises(Unsupported, match=f"kernel='jax_nn' cannot run this: .*{said}"):
        attention(*qkv(), **LACKS[said], kernel="jax_nn")
    told, usual = answers(*qkv(), **LACKS[said]), answers(*qkv())
    assert said in told["jax_nn"]
    assert {n for n in told if told[n] != usual[n]} == {"jax_nn"}
    attention(*qkv(), **LACKS[said])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (dict(q=(1, 4, 5, 8)), "when lengths differ"),
        (dict(v=(1, 2, 6, 7)), "one head size for keys and values"),
        (dict(k=(1, 2, 0, 8), v=(1, 2, 0, 8)), "at least one query and one key"),
    ],
)
def test_what_sizes_a_kernel_lacks_it_says(arrays, said):
    causal = {} if "least" in said else dict(mask_mod=Causal())
    with pytest.raises(Unsupported, match=said):
        attention(*qkv(**arrays), **causal, kernel="jax_nn")
    assert said in answers(*qkv(**arrays), **causal)["jax_nn"]


def test_every_option_reaches_every_kernel():
    """What `attention` takes for itself aside, a kernel that runs takes all of it."""
    own = {"kernel", "segment_ids", "query_lengths", "key_lengths"}
    options = inspect.signature(attention).parameters.keys() - own
    for kernel in raptax.KERNELS:
        assert inspect.signature(kernel.run).parameters.keys() == options
    assert inspect.signature(raptax.AttentionFn.__call__).parameters.keys() == (
        options | {"self"}
    )
    with pytest.raises(TypeError, match="attention\\(\\) takes no 'mask_mods'"):
        explain(*qkv(), mask_mods=Causal())


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        (dict(q=(4, 6, 8)), r"query must be \(batch, heads, length, head size\)"),
        (dict(k=(1, 2, 6, 4)), "query and key must share a head size; got 8 and 4"),
        (dict(v=(1, 2, 5, 8)), "key and value must agree"),
        (dict(k=(2, 2, 6, 8), v=(2, 2, 6, 8)), "must share a batch size; got 1 and 2"),
        (dict(q=(1, 3, 6, 8)), "query_heads=3 must be a multiple of kv_heads=2"),
    ],
)
@pytest.mark.parametrize("kernel", [None, *(k.name for k in raptax.KERNELS)])
def test_shapes_that_do_not_fit(unchecked, arrays, named, kernel):
    with pytest.raises(ValueError, match=named):
        attention(*qkv(**arrays), kernel=kernel)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(mask=jnp.ones((1, 1, 6, 6))), "mask must be boolean"),
        (dict(mask=jnp.ones((1, 3, 6, 6), bool)), "must broadcast to"),
        (dict(mask=jnp.ones((6, 5), bool)), "must broadcast to"),
        (dict(mask=jnp.ones((1, 1, 1, 6, 6), bool)), "must broadcast to"),
        (dict(bias=jnp.ones((1, 3, 6, 6))), "must broadcast to"),
        (dict(bias=jnp.ones((6, 6), bool)), "bias must be of floats"),
        (dict(sinks=jnp.ones(3)), "must be one number for each of"),
        (dict(dropout_rate=1.0), r"must lie in \[0, 1\)"),
        (dict(dropout_rate=0.5, deterministic=False), "needs a dropout_rng"),
        (dict(mask_mod="causal"), "must be callable; got 'causal'"),
        (dict(mask_mod=lambda b, h, q, k: q + k), "must return booleans"),
        (dict(score_mod=lambda s, *_: s[0]), "must return scores as they came"),
        (
            dict(score_mod=lambda s, *_: s.astype(jnp.bfloat16)),
            "must return scores as they came",
        ),
    ],
)
@pytest.mark.parametrize("kernel", [None, "reference"])
def test_options_that_do_not_fit(unchecked, options, named, kernel):
    with pytest.raises(ValueError, match=named):
        attention(*qkv(), **options, kernel=kernel)


def test_mixed_dtypes_are_refused(unchecked):
    q, k, v = qkv()
    with pytest.raises(ValueError, match="must share a dtype"):
        attention(q, k.astype(jnp.bfloat16), v)


def test_a_fault_inside_a_mod_surfaces_as_itself():
    def broken(scores, b_idx, h_idx, q_idx, kv_idx):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        attention(*qkv(), score_mod=broken)


def test_paged_attention_checks_its_arrays(unchecked):
    pages = jnp.ones((4, 2, 8, 16))
    good = dict(
        table=jnp.zeros((2, 3), jnp.int32),
        lengths=jnp.ones(2, jnp.int32),
        row_offsets=jnp.arange(3, dtype=jnp.int32),
    )
    query = jnp.ones((2, 4, 16))
    assert paged_attention(query, pages, pages, **good).shape == (2, 4, 16)
    with pytest.raises(ValueError, match="query_heads=3"):
        paged_attention(query[:, :3], pages, pages, **good)
    with pytest.raises(ValueError, match="must share a head size with k_pages"):
        paged_attention(query[..., :8], pages, pages, **good)
    offsets = jnp.arange(4, dtype=jnp.int32)
    with pytest.raises(ValueError, match="must speak of the same sequences"):
        paged_attention(query, pages, pages, **good | dict(row_offsets=offsets))


def test_importable_names_are_documented():
    for name in dir(raptax):
        thing = getattr(raptax, name)
        if not name.startswith("_") and callable(thing):
            assert thing.__doc__, name


def test_jit_and_vmap_over_attention():
    q, k, v = qkv()
    expected = attention(q, k, v, mask_mod=Causal())
    jitted = jax.jit(lambda q, k, v, m: attention(q, k, v, mask_mod=m))
    np.testing.assert_allclose(jitted(q, k, v, Causal()), expected, atol=1e-6)
    stacked = [jnp.stack([x, x]) for x in (q, k, v)]
    mapped = jax.vmap(lambda q, k, v: attention(q, k, v, mask_mod=Causal()))
    np.testing.assert_allclose(mapped(*stacked)[1], expected, atol=1e-6)


TABLE = jnp.arange(40, dtype=jnp.uint32)
HARD_TO_SAY = {
    "int8 cast": lambda b, h, q, k: q.astype(jnp.int8) - k.astype(jnp.int8) < 5,
    "uint8 table": lambda b, h, q, k: TABLE.astype(jnp.uint8)[q] >= k.astype(jnp.uint8),
    "uint32 rem": lambda b, h, q, k: TABLE[q] % jnp.uint32(3) == 0,
    "uint32 max": lambda b, h, q, k: jnp.maximum(TABLE[q], k.astype(jnp.uint32)) < 30,
    "uint32 float": lambda b, h, q, k: TABLE[k].astype(jnp.float32) < 20,
    "sort": lambda b, h, q, k: jnp.sort(k, axis=-1) <= q,
}


@pytest.mark.parametrize("name", HARD_TO_SAY)
def test_what_explain_says_is_what_a_call_does(name):
    """The call never raises what another kernel could have done."""
    x, mask_mod = jnp.linspace(-1, 1, 640).reshape(1, 2, 40, 8), HARD_TO_SAY[name]
    verdict = explain(x, x, x, mask_mod=mask_mod).splitlines()[0]
    if "cannot" in verdict:
        with pytest.raises(Unsupported, match="native"):
            attention(x, x, x, mask_mod=mask_mod, kernel="native")
    else:
        attention(x, x, x, mask_mod=mask_mod, kernel="native")
    wanted = attention(x, x, x, mask_mod=mask_mod, kernel="reference")
    np.testing.assert_allclose(attention(x, x, x, mask_mod=mask_mod), wanted, atol=1e-5)
    if name == "sort":
        return  # pages are not whole sequences
    pages = x[0].reshape(2, 10, 4, 8).swapaxes(0, 1)
    out = paged_attention(
        x[0].swapaxes(0, 1),
        pages,
        pages,
        table=jnp.arange(10, dtype=jnp.int32)[None],
        lengths=jnp.array([40], jnp.int32),
        row_offsets=jnp.array([0, 40], jnp.int32),
        mask_mod=mask_mod,
    )
    np.testing.assert_allclose(out.swapaxes(0, 1)[None], wanted, atol=1e-5)
