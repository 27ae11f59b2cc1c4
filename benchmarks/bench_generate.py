"""Generation with SmolLM2-135M: load, memory, first token, tokens/s, next to llama.cpp.

    python -m benchmarks.bench_generate

Each form that weights can take in memory, and llama.cpp if `llama-cpp-python` is
installed, runs in a process of its own; the processes take turns. Decoding reads every
weight once a token, so the yardstick is bytes of weights times tokens/s against what the
machine reads from memory. Exits with 1 if the forms that round nothing do not agree on
the tokens.
"""

import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

PROMPT = "The three laws of motion, explained to a child:"
TOKENS, ROUNDS = 96, 3
FORMS = {
    "packed": dict(weights="packed"),
    "packed, int8": dict(weights="packed", precision="int8"),
    "codes": dict(weights="codes"),
    "float32": dict(weights="float32"),
    "blocks": dict(weights="blocks"),
}


def resident() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_raptax(form: str) -> dict:
    """One process: load, then two runs, of which the second is warm."""
    import jax
    from flax import nnx

    from raptax.cli import _keep_compiled_programs
    from raptax.generate import generate_ids
    from raptax.models import load

    _keep_compiled_programs()
    start = time.perf_counter()
    model = load("smollm2", **FORMS[form])
    loaded = time.perf_counter() - start
    prompt = model.tokenizer.encode(PROMPT)
    for _ in range(2):
        times = [time.perf_counter()]
        ids = []
        for token in generate_ids(model.decoder, prompt, max_tokens=TOKENS):
            times.append(time.perf_counter())
            ids.append(token)
        if len(times) == TOKENS + 1:
            first = times[1] - times[0]
        rate = (len(ids) - 1) / (times[-1] - times[1])
    leaves = jax.tree.leaves(nnx.split(model.decoder)[1])
    weights = sum(leaf.nbytes for leaf in leaves) / 1e6
    return dict(
        load=loaded, first=first, rate=rate, weights=weights, rss=resident(), ids=ids
    )


def run_llama_cpp() -> dict:
    """The same through llama.cpp, which rounds activations to 8 bits."""
    import llama_cpp

    from raptax.models import fetch

    start = time.perf_counter()
    path = fetch("smollm2")
    model = llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=os.cpu_count(), verbose=False
    )
    loaded = time.perf_counter() - start
    prompt = model.tokenize(PROMPT.encode(), add_bos=False, special=True)
    for _ in range(2):
        model.reset()
        times, ids = [time.perf_counter()], []
        for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            times.append(time.perf_counter())
            ids.append(token)
            if len(ids) == TOKENS:
                break
        first, rate = times[1] - times[0], (len(ids) - 1) / (times[-1] - times[1])
    weights = os.path.getsize(path) / 1e6
    return dict(
        load=loaded, first=first, rate=rate, weights=weights, rss=resident(), ids=ids
    )


def child(name: str) -> dict | None:
    """What a process of its own prints, or None where llama.cpp is not installed."""
    command = [sys.executable, "-m", "benchmarks.bench_generate", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 3:
        return None
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from benchmarks.machine import read_bandwidth

    results: dict[str, list[dict]] = {}
    for _ in range(ROUNDS):
        for name in (*FORMS, "llama.cpp"):
            if (result := child(name)) is not None:
                results.setdefault(name, []).append(result)
    bandwidth = read_bandwidth()
    print(f"memory read rate {bandwidth / 1e9:.1f} GB/s; medians of {ROUNDS} processes")
    print(
        "weights          MB  process MB  load s   first s  tokens/s (spread)  of read"
    )
    for name, runs in results.items():
        of = lambda key, runs=runs: np.median([run[key] for run in runs])
        rates = [run["rate"] for run in runs]
        share = of("weights") * 1e6 * of("rate") / bandwidth
        print(
            f"{name:12} {of('weights'):6.0f} {of('rss'):11.0f} {of('load'):7.2f} "
            f"{of('first'):8.3f} {of('rate'):9.1f} ({max(rates) / min(rates):.2f}) "
            f"{share:11.0%}"
        )
    exact = [name for name, options in FORMS.items() if "precision" not in options]
    answers = {tuple(run["ids"]) for name in exact for run in results[name]}
    if len(answers) > 1:
        sys.exit("the forms do not agree on the tokens")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "llama.cpp":
        try:
            import llama_cpp  # noqa: F401
        except ImportError:
            sys.exit(3)
        print(json.dumps(run_llama_cpp()))
    else:
        print(json.dumps(run_raptax(sys.argv[1])))
