"""Generation against the plainest loop, and how little work it does per token."""

import functools
import importlib
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from raptax.generate import Sampler, generate, generate_ids, text_of
from raptax.models import load

# `raptax.generate.loop` is the function; this is the module it lives in.
module = importlib.import_module("raptax.generate.loop")

PROMPT = [40, 3, 200, 77, 5, 40, 118]
COUNT = 30
WARM = Sampler.create(temperature=1.0, top_k=20, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return load(tiny.write(path, encodings="Q8_0"))


@pytest.fixture(scope="module")
def decoder(model):
    return model.decoder


@pytest.fixture
def decode_steps(monkeypatch):
    """Changes how much is decoded at a time; programs remember how it was."""
    program = module.decode

    def changed(steps):
        monkeypatch.setattr(module, "DECODE_STEPS", steps)
        program.clear_cache()

    yield changed
    program.clear_cache()


@functools.partial(jax.jit, static_argnums=0)
def whole_pass(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)[0][0]


def plain_loop(decoder, prompt, count, sampler=Sampler(), seed=0):
    """No cache, no loop on the device: the whole text again for each token."""
    ids, size = list(prompt), decoder.config.vocab_size
    for _ in range(count):
        padded = np.pad(ids, (0, 128 - len(ids)))  # what comes later is not seen
        tokens = jnp.asarray(padded[None], jnp.int32)
        logits = whole_pass(*nnx.split(decoder), tokens)[len(ids) - 1]
        seen = jnp.asarray(np.isin(np.arange(size), ids))
        key = jax.random.fold_in(jax.random.key(seed), len(ids))
        ids.append(int(jax.jit(Sampler.__call__)(sampler, logits, seen, key)))
    return ids[len(prompt) :]


def ids_of(decoder, prompt=PROMPT, max_tokens=COUNT, **options):
    return list(generate_ids(decoder, prompt, max_tokens=max_tokens, **options))


# What comes out


def test_greedy_is_an_argmax_loop(decoder):
    want = plain_loop(decoder, PROMPT, COUNT)
    assert len(set(want)) > 5  # it does not just repeat itself
    assert ids_of(decoder) == want


@pytest.mark.parametrize("seed", [0, 7])
def test_sampling_is_a_plain_loop_with_a_key_for_each_place(decoder, seed):
    want = plain_loop(decoder, PROMPT, COUNT, WARM, seed)
    assert ids_of(decoder, sampler=WARM, seed=seed) == want


def test_how_the_work_is_cut_does_not_show(decoder, decode_steps, monkeypatch):
    prompt = (PROMPT * 6)[:39]
    options = dict(prompt=prompt, sampler=WARM, seed=5)
    want = ids_of(decoder, **options)
    for rows in (16, 39, 13):  # the last: parts shorter than a step takes
        monkeypatch.setattr(module, "PREFILL_ROWS", rows)
        assert ids_of(decoder, **options) == want
    for steps in (1, 64):
        decode_steps(steps)
        assert ids_of(decoder, **options) == want


def test_a_prompt_of_many_parts(decoder, monkeypatch):
    prompt = np.random.default_rng(4).integers(0, 279, 90).tolist()
    monkeypatch.setattr(module, "PREFILL_ROWS", 16)
    assert ids_of(decoder, prompt, 8) == plain_loop(decoder, prompt, 8)


def test_over_the_end_of_a_page(decoder):
    prompt = np.random.default_rng(5).integers(0, 279, 120).tolist()
    ids = ids_of(decoder, prompt, 20)  # pages have 128 tokens
    tokens = jnp.asarray([prompt + ids], jnp.int32)
    logits = whole_pass(*nnx.split(decoder), tokens)
    assert ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_a_seed_decides(decoder):
    one, again, other = (ids_of(decoder, sampler=WARM, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    greedy, seeded = ids_of(decoder), ids_of(decoder, seed=3)
    assert greedy == seeded
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed={seed} must lie in"):
            generate_ids(decoder, PROMPT, max_tokens=1, seed=seed)


# Where it ends


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 10, 17])
def test_as_many_tokens_as_asked_for(decoder, tokens):
    assert ids_of(decoder, max_tokens=tokens) == ids_of(decoder)[:tokens]


def test_a_stop_token_is_the_last(decoder):
    ids = ids_of(decoder)
    ends = set()
    for token in ids:
        end = ids.index(token) + 1
        assert ids_of(decoder, stop=frozenset({token, -7})) == ids[:end]
        ends.add(end)
    # The first token, a portion's first, one inside and its last were all among them.
    assert {1, 2, 5, 9} <= ends


def test_the_context_may_be_filled_to_its_end(decoder):
    left = decoder.config.max_position - len(PROMPT)
    assert len(ids_of(decoder, max_tokens=left)) == left


BAD = {
    "empty": (dict(prompt=[]), "the prompt has no tokens"),
    "no tokens": (dict(max_tokens=0), "max_tokens=0 must be at least 1"),
    "fewer": (dict(max_tokens=-1), "max_tokens=-1"),
    "too long": (
        dict(prompt=[1] * 200, max_tokens=57),
        "prompt of 200 tokens and 57 more exceed the model's context of 256",
    ),
    "id too high": (dict(prompt=[1, 279, 280]), r"\[0, 279\); got \[279, 280\]"),
    "id too low": (dict(prompt=[-1]), r"got \[-1\]"),
}


@pytest.mark.parametrize(("slip", "sentence"), BAD.values(), ids=BAD)
def test_slips_are_told_at_the_call(model, slip, sentence):
    """Not at the first token: that may be far from the line that is wrong."""
    options = {"prompt": PROMPT, "max_tokens": 1, **slip}
    for call, first in ((generate_ids, model.decoder), (generate, model)):
        with pytest.raises(ValueError, match=sentence):
            call(first, options["prompt"], max_tokens=options["max_tokens"])


# Text


def test_text_is_what_the_tokens_say(model):
    text = "in the nation"
    prompt = model.tokenizer.encode(text)
    ids = ids_of(model.decoder, prompt)
    assert len(prompt) < len(text)  # its merges are there
    assert tiny.END not in ids
    pieces = list(generate(model, text, max_tokens=COUNT))
    assert pieces == list(generate(model, prompt, max_tokens=COUNT))
    assert "".join(pieces) == model.tokenizer.decode(ids)
    assert all(pieces)


def test_a_text_ends_before_its_stop_token(model):
    prompt = model.tokenizer.encode("the nation is singing")
    ids = ids_of(model.decoder, prompt)
    assert tiny.END in ids[1:]
    text = "".join(generate(model, prompt, max_tokens=COUNT))
    assert text == model.tokenizer.decode(ids[: ids.index(tiny.END)])


def test_text_leaves_out_the_stop_token_and_breaks_no_character(model):
    tokenizer = model.tokenizer
    ids = tokenizer.encode("né—日")
    assert len(ids) > 4
    assert list(text_of([*ids, tiny.END], tokenizer)) == ["n", "é", "—", "日"]
    assert list(text_of(ids[:-1], tokenizer)) == ["n", "é", "—", "\ufffd"]


def test_an_empty_text_is_an_empty_prompt(model):
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        generate(model, "")


# How it is done


@pytest.fixture
def calls(monkeypatch):
    """Counts calls to the device."""
    counts = dict.fromkeys(("prefill", "decode"), 0)

    def counted(name):
        program = getattr(module, name)

        @functools.wraps(program)
        def call(*args, **kwargs):
            counts[name] += 1
            return program(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in counts:
        counted(name)
    return counts


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 10, 30])
def test_one_call_a_portion(decoder, calls, tokens):
    ids_of(decoder, max_tokens=tokens)
    portions = math.ceil((tokens - 1) / module.DECODE_STEPS)
    ahead = min(tokens - 1, 1)  # without steps, so that the program is there in time
    assert calls == {"prefill": 1, "decode": ahead + portions}


def test_one_call_a_part_of_the_prompt(decoder, calls, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_ROWS", 16)
    ids_of(decoder, [1] * 33, max_tokens=1)
    assert calls == {"prefill": 3, "decode": 0}


def test_nothing_runs_before_it_is_asked_for(decoder, calls):
    tokens = generate_ids(decoder, PROMPT, max_tokens=COUNT)
    assert calls == {"prefill": 0, "decode": 0}
    next(tokens)
    assert calls == {"prefill": 1, "decode": 1}
    list(itertools.islice(tokens, 8))
    assert calls == {"prefill": 1, "decode": 2}


def test_numbers_and_seeds_compile_nothing_anew(decoder):
    def warm(temperature, seed):
        sampler = Sampler.create(temperature=temperature)
        ids_of(decoder, sampler=sampler, seed=seed, max_tokens=seed + 20)

    warm(1.0, 0)
    programs = module.decode._cache_size(), module.prefill._cache_size()
    warm(0.5, 1)
    assert (module.decode._cache_size(), module.prefill._cache_size()) == programs


def decode_arguments(decoder):
    run = module._Run(decoder, PROMPT, 400, Sampler(), 0, frozenset())
    args = run.graph, run.state, run.cache, run.seen, jnp.asarray(1, jnp.int32)
    return args, dict(
        steps=jnp.asarray(8, jnp.int32),
        sampler=run.sampler,
        rng=jax.random.key(0),
        stops=run.stops,
    )


def prefill_arguments(decoder):
    args, _ = decode_arguments(decoder)
    rows = jnp.zeros(16, jnp.int32), jnp.asarray([0, 16], jnp.int32)
    return (*args[:3], *rows), {}


PROGRAMS = {"decode": decode_arguments, "prefill": prefill_arguments}


def copies(program, args, options) -> list[str]:
    """The lines of a compiled program that copy as much as all keys or all values."""
    pool = args[2].k_pages
    text = program.lower(*args, **options).compile().as_text()
    return [
        found[0]
        for found in re.finditer(r".*= f32\[([\d,]+)\]\S* copy(-start)?\(.*", text)
        if math.prod(map(int, found[1].split(","))) == pool.size
    ]


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_copies_the_cache(decoder, name):
    args, options = PROGRAMS[name](decoder)
    program = getattr(module, name)
    assert copies(program, args, options) == []
    # One that must keep its argument has to: so the search would find a copy.
    keeps = jax.jit(program.__wrapped__, static_argnums=0)
    assert len(copies(keeps, args, options)) >= 2


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_cache_stays_where_it_is(decoder, name):
    args, options = PROGRAMS[name](decoder)
    places = [pages.unsafe_buffer_pointer() for pages in pools(args[2])]
    old = pools(args[2])
    cache = getattr(module, name)(*args, **options)[0]
    assert [pages.unsafe_buffer_pointer() for pages in pools(cache)] == places
    assert all(pages.is_deleted() for pages in old)
    assert cache.lengths.tolist() == [{"decode": 8, "prefill": 16}[name]]


def pools(cache):
    return cache.k_pages, cache.v_pages


def test_the_cache_is_as_large_as_the_text_needs(decoder):
    sizes = {}
    for tokens in (1, 121, 122, 249):
        run = module._Run(decoder, PROMPT, tokens, Sampler(), 0, frozenset())
        sizes[tokens] = run.cache.k_pages.shape[1]
    assert sizes == {1: 1, 121: 1, 122: 2, 249: 2}
