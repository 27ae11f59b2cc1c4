"""Prefill and decoding of SmolLM2-135M at several contexts, next to other engines.

    python -m benchmarks.bench_engines [--rounds 3] [engine ...]

The same GGUF file (Q4_1) in raptax, with inputs of products as they are and rounded to
int8, in llama.cpp and in OpenVINO GenAI, as far as those are installed. Each engine runs
in a process of its own, which keeps its model; the processes take turns, one context at
a time, and rest otherwise. Prompts are random tokens. Prints medians of tokens/s: of the
prompt up to the first token, and of 64 tokens after it, with the spread. Exits with 1 if
raptax does not write the same tokens for the same prompt, or an engine fails.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTEXTS = (32, 512, 1024, 2048)
TOKENS = 64
WARM = 1000  # the number of the prompts that warm up
ROOM = CONTEXTS[-1] + TOKENS + 8

# Seconds until the first token, seconds for the others, and the tokens.
Run = Callable[[list[int]], tuple[float, float, list[int]]]


def prompt_of(length: int, number: int) -> list[int]:
    """A new one each time, as some engines keep what they have seen."""
    rng = np.random.default_rng([length, number])
    return rng.integers(100, 49000, length).tolist()


def raptax_run(precision: str) -> Run:
    from raptax.generate import generate_ids
    from raptax.models import load

    model = load("smollm2", precision=precision)

    def run(prompt: list[int]) -> tuple[float, float, list[int]]:
        times, ids = [time.perf_counter()], []
        for token in generate_ids(model.decoder, prompt, max_tokens=TOKENS + 1):
            times.append(time.perf_counter())
            ids.append(token)
        return times[1] - times[0], times[-1] - times[1], ids

    return run


def llama_cpp_run() -> Run:
    import llama_cpp

    from raptax.models import fetch

    threads = os.cpu_count()
    model = llama_cpp.Llama(
        str(fetch("smollm2")),
        n_ctx=ROOM,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=2048,
        n_ubatch=512,
        verbose=False,
    )

    def run(prompt: list[int]) -> tuple[float, float, list[int]]:
        model.reset()
        times, ids = [time.perf_counter()], []
        for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            times.append(time.perf_counter())
            ids.append(token)
            if len(ids) == TOKENS + 1:
                break
        return times[1] - times[0], times[-1] - times[1], ids

    return run


def openvino_run() -> Run:
    import openvino
    import openvino_genai

    from raptax.models import fetch

    model = openvino_genai.LLMPipeline(str(fetch("smollm2")), "CPU")

    def run(prompt: list[int]) -> tuple[float, float, list[int]]:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=TOKENS + 1, do_sample=False, ignore_eos=True
        )
        ids = openvino.Tensor(np.array([prompt], np.int64))
        inputs = openvino_genai.TokenizedInputs(
            ids, openvino.Tensor(np.ones((1, len(prompt)), np.int64))
        )
        found = model.generate(inputs, config)
        metrics = found.perf_metrics
        first = metrics.get_ttft().mean / 1e3
        return first, metrics.get_tpot().mean / 1e3 * TOKENS, list(found.tokens[0])

    return run


ENGINES: dict[str, Callable[[], Run]] = {
    "raptax": lambda: raptax_run("float32"),
    "raptax, int8": lambda: raptax_run("int8"),
    "llama.cpp": llama_cpp_run,
    "OpenVINO": openvino_run,
}


def serve(name: str) -> None:
    """Answers lengths of prompts with what a run took, line by line."""
    try:
        run = ENGINES[name]()
    except ImportError:
        sys.exit(3)
    for length in CONTEXTS:  # compiled, and caches warm
        run(prompt_of(length, WARM))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(prompt_of(*map(int, line.split())))), flush=True)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def started(names: list[str]) -> dict[str, Any]:
    """The engines that are installed, each in a process that is ready."""
    engines = {}
    for name in names:
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name, "--serve", name]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while (line := process.stdout.readline()) not in ("ready\n", ""):
            pass
        if line:
            engines[name] = process
        elif process.wait() == 3:
            print(f"{name} is not installed")
        else:
            sys.exit(f"{name} failed")
    return engines


def ask(process: Any, length: int, number: int) -> tuple[float, float, list[int]]:
    process.stdin.write(f"{length} {number}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve")
    parser.add_argument("engines", nargs="*", default=list(ENGINES))
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    engines = started(options.engines)
    print(f"{cpu_name()}, {os.cpu_count()} cores; medians of {options.rounds} rounds")
    print(
        f"{'context':>8} {'engine':14} {'prefill':>9} {'decode':>9} tokens/s (spread)"
    )
    unstable = []
    for length in CONTEXTS:
        runs: dict[str, list[Any]] = {name: [] for name in engines}
        for number in range(options.rounds):
            for name, process in engines.items():
                runs[name].append(ask(process, length, number))
        for name, found in runs.items():
            prefill = np.array([length / first for first, _, _ in found])
            decode = np.array([(len(ids) - 1) / rest for _, rest, ids in found])
            print(
                f"{length:8} {name:14} {np.median(prefill):9.0f} "
                f"{np.median(decode):9.1f} ({decode.max() / decode.min():.2f})",
                flush=True,
            )
            if "raptax" in name and ask(engines[name], length, 0)[2] != found[0][2]:
                unstable.append(f"{name} at {length}")
    for process in engines.values():
        process.stdin.close()
        process.wait()
    if unstable:
        sys.exit(f"other tokens each time: {', '.join(unstable)}")


if __name__ == "__main__":
    main()
