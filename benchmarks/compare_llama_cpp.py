"""Greedy tokens of SmolLM2-135M, ours against llama.cpp's.

    python -m benchmarks.compare_llama_cpp

llama.cpp rounds activations to 8 bits, so the two may part where the first two choices
are close. Both are fed the same tokens (ours), and each step at which their first
choices differ is listed with the gap of our logits. Exits with 1 if a gap exceeds
`NEAR`, which eight-bit activations do not explain.
"""

import sys

import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np

from raptax.generate import generate_ids
from raptax.models import fetch, load

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "The three laws of motion, explained to a child:",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
)
TOKENS = 64
NEAR = 0.5


def main() -> None:
    path = fetch("smollm2")
    model = load("smollm2")
    peer = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False)
    steps = differ = 0
    worst = 0.0
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        if ids != peer.tokenize(prompt.encode(), add_bos=False, special=True):
            sys.exit(f"the tokens of {prompt!r} differ")
        new = list(generate_ids(model.decoder, ids, max_tokens=TOKENS))
        every = jnp.asarray([ids + new[:-1]], jnp.int32)
        logits = np.asarray(jax.jit(lambda t: model.decoder(t)[0])(every))[0]
        logits = logits[len(ids) - 1 :]
        peer.reset()
        peer.eval(ids + new[:-1])
        theirs = peer.scores[len(ids) - 1 : len(ids) - 1 + len(new)].argmax(-1)
        assert logits.argmax(-1).tolist() == new
        for step, (our, their) in enumerate(zip(new, theirs.tolist(), strict=True)):
            steps += 1
            if our != their:
                gap = logits[step, our] - logits[step, their]
                differ, worst = differ + 1, max(worst, gap)
                pieces = model.tokenizer.decode([our]), model.tokenizer.decode([their])
                print(
                    f"{prompt[:32]!r} step {step}: {pieces[0]!r} here, {pieces[1]!r} "
                    f"there, our gap {gap:.4f}"
                )
    print(f"{steps - differ} of {steps} first choices agree; largest gap {worst:.4f}")
    if worst > NEAR:
        sys.exit(f"a gap over {NEAR} is not a near-tie")


if __name__ == "__main__":
    main()
