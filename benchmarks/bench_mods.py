"""What flexible attention costs on a CPU, and how it compares with PyTorch's.

Run:  python -W ignore -m benchmarks.bench_mods [--dtype float32] [--repeats 7]
Three tables. Mods that PyTorch's compiled `flex_attention` knows too, each with the
same causal mask, ours and theirs in turns; it is optional and takes a minute to compile.
What a score_mod or a mask costs where no tile is empty or full, as multiples of
the time without one. And a window next to a causal mask, with the tiles that each has to
visit. Prints medians and the spread of ours (90th over 10th percentile). Ends with an
error if an output is wrong.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import raptax
from benchmarks.machine import arguments, seconds, torch
from raptax.kernels import native_attention, reference_attention

if torch is not None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

H = 8
DISTANCES = 128  # of the learned bias, to either side
CAP = 20.0
TILE = 128
SHORT = 512  # what is compared with the definition


class Mods(NamedTuple):
    """One mod in both languages: keyword arguments, given the length."""

    ours: Callable[[int], dict[str, Any]]
    theirs: Callable[[int], dict[str, Any]]


def table() -> np.ndarray:
    """Learned bias by head and distance."""
    rng = np.random.default_rng(7)
    return rng.normal(size=(H, 2 * DISTANCES + 1)).astype(np.float32)


def document_ids(S: int) -> np.ndarray:
    return (np.arange(S) // (S // 7 + 1)).astype(np.int32)


def their_mask(S: int, ids: Any = None) -> dict[str, Any]:
    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def both(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (ids[q] == ids[k])

    mask = causal if ids is None else both
    return dict(block_mask=create_block_mask(mask, None, None, S, S, device="cpu"))


def their_cap(S: int) -> dict[str, Any]:
    change = lambda score, b, h, q, k: CAP * torch.tanh(score / CAP)
    return their_mask(S) | dict(score_mod=change)


def their_alibi(S: int) -> dict[str, Any]:
    slopes = torch.from_numpy(np.array(raptax.alibi_slopes(H)))
    change = lambda score, b, h, q, k: score - slopes[h] * (q - k)
    return their_mask(S) | dict(score_mod=change)


def their_documents(S: int) -> dict[str, Any]:
    return their_mask(S, torch.from_numpy(document_ids(S)))


def their_bias(S: int) -> dict[str, Any]:
    bias = torch.from_numpy(table())
    middle = DISTANCES

    def change(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score + bias[h, torch.clamp(k - q, -middle, middle) + middle]

    return their_mask(S) | dict(score_mod=change)


def our_bias(S: int) -> dict[str, Any]:
    return dict(score_mod=raptax.RelativeBias(jnp.asarray(table())))


MODS = {
    "soft cap": Mods(lambda S: dict(score_mod=raptax.SoftCap(CAP)), their_cap),
    "ALiBi": Mods(
        lambda S: dict(score_mod=raptax.ALiBi(raptax.alibi_slopes(H))), their_alibi
    ),
    "documents": Mods(
        lambda S: dict(
            mask_mod=raptax.Causal()
            & raptax.Documents(jnp.asarray(document_ids(S))[None])
        ),
        their_documents,
    ),
    "relative bias": Mods(our_bias, their_bias),
}


def costs(S: int) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(8)
    flags = jnp.asarray(rng.random(64) < 0.9)
    return {
        "no mod": {},
        "soft cap": dict(score_mod=raptax.SoftCap(CAP)),
        "ALiBi": dict(score_mod=raptax.ALiBi(raptax.alibi_slopes(H))),
        "relative bias": our_bias(S),
        # No tile is full or empty, and no kernel can foresee it.
        "mask by array": dict(
            mask_mod=lambda b, h, q, k: flags[jnp.mod(q + 3 * k, flags.shape[0])]
        ),
        "dense bias": dict(
            bias=jnp.asarray(rng.normal(size=(1, 1, S, S)).astype(np.float32))
        ),
    }


def random_arrays(S: int, D: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(1, H, S, D)).astype(np.float32) for _ in range(3)]


def call(arrays: list[np.ndarray], dtype: str, options: dict[str, Any]) -> Any:
    q, k, v = (jnp.asarray(x).astype(dtype) for x in arrays)
    attend = jax.jit(functools.partial(native_attention, **options))
    return lambda: attend(q, k, v)


def their_call(arrays: list[np.ndarray], dtype: str, options: dict[str, Any]) -> Any:
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays)
    torch._dynamo.reset()  # or the ninth program is not compiled any more
    flex = torch.compile(functools.partial(flex_attention, **options))
    return torch.no_grad()(lambda: flex(q, k, v))


def correct(arrays: list[np.ndarray], dtype: str, options: dict[str, Any]) -> bool:
    """Ours against the definition in float32."""
    q, k, v = (jnp.asarray(x).astype(dtype) for x in arrays)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    wanted = reference_attention(*wide, **options)
    actual = native_attention(q, k, v, **options).astype(jnp.float32)
    tolerance = max(2e-5, 3 * float(jnp.finfo(dtype).eps))
    return bool((jnp.abs(actual - wanted) <= tolerance).all())


def compare(dtype: str, D: int, S: int, repeats: int) -> tuple[list[float], list[str]]:
    """One line for each mod that both know; how many times faster, and what is wrong."""
    ratios, wrong = [], []
    arrays = random_arrays(S, D)
    for name, mods in MODS.items():
        options = dict(mask_mod=raptax.Causal()) | mods.ours(S)
        calls = {"raptax": call(arrays, dtype, options)}
        if torch is not None:
            calls["torch"] = their_call(arrays, dtype, mods.theirs(S))
        times = seconds(calls, repeats)
        low, median, high = np.quantile(times["raptax"], [0.1, 0.5, 0.9])
        line = f"{dtype:9}{name:15}{S:6}{D:5}{median * 1e3:10.2f} ms{high / low:6.2f}"
        if torch is not None:
            theirs = float(np.median(times["torch"]))
            ratios.append(theirs / median)
            line += f"   flex {theirs * 1e3:8.2f} ms {ratios[-1]:5.2f}x"
            apart = np.abs(
                np.asarray(calls["raptax"]().astype(jnp.float32))
                - calls["torch"]().float().numpy()
            ).max()
            if apart > max(5e-5, 8 * float(jnp.finfo(dtype).eps)):
                wrong.append(f"{dtype} {name} D={D}: {apart:.1e} from PyTorch")
        print(line, flush=True)
        short = dict(mask_mod=raptax.Causal()) | mods.ours(SHORT)
        if not correct(random_arrays(SHORT, D), dtype, short):
            wrong.append(f"{dtype} {name} D={D}")
    return ratios, wrong


def cost(dtype: str, D: int, S: int, repeats: int) -> list[str]:
    """One line: what each change costs where all tiles are visited and changed."""
    arrays = random_arrays(S, D)
    calls = {name: call(arrays, dtype, options) for name, options in costs(S).items()}
    medians = {name: np.median(t) for name, t in seconds(calls, repeats).items()}
    plain = medians.pop("no mod")
    print(
        f"{dtype:9}{S:6}{D:5}{plain * 1e3:10.2f} ms  ",
        *(f"{name} {t / plain:.2f}  " for name, t in medians.items()),
        flush=True,
    )
    return [
        f"{dtype} {name} D={D}"
        for name, options in costs(SHORT).items()
        if not correct(random_arrays(SHORT, D), dtype, options)
    ]


def tiles_of(mask: Any, S: int) -> float:
    """The share of tiles that are not empty."""
    tiles = raptax.create_block_mask(mask, seq_q=S, seq_kv=S, block=(TILE, TILE))
    return 1 - tiles.sparsity() / 100


def window(dtype: str, S: int, repeats: int) -> None:
    """A window's time next to the causal mask's, and their tiles."""
    arrays = random_arrays(S, 64)
    masks = {"window": raptax.SlidingWindow(256), "causal": raptax.Causal()}
    calls = {name: call(arrays, dtype, dict(mask_mod=m)) for name, m in masks.items()}
    medians = {name: np.median(t) for name, t in seconds(calls, repeats).items()}
    visited = {name: tiles_of(mask, S) for name, mask in masks.items()}
    time, tiles = (x["window"] / x["causal"] for x in (medians, visited))
    print(
        f"{dtype:9}window 256, S={S}: {time:.4f} of the causal time with {tiles:.4f} of "
        f"its tiles of {TILE} x {TILE}: {time / tiles:.2f} times",
        flush=True,
    )


def main() -> int:
    options = arguments(__doc__)
    dtypes, repeats = options.dtype, options.repeats
    ratios: list[float] = []
    wrong: list[str] = []
    print("causal and               S    D       ours   p90/p10   PyTorch, compiled")
    for dtype in dtypes:
        for D in (64, 128):
            faster, bad = compare(dtype, D, 2048, repeats)
            ratios, wrong = ratios + faster, wrong + bad
    if ratios:
        print(f"geometric mean {np.exp(np.mean(np.log(ratios))):.2f}x")
    print("\nall tiles visited, none full: how many times the time without a mod")
    for dtype in dtypes:
        for D in (64, 128):
            wrong += cost(dtype, D, 2048, repeats)
    print()
    for dtype in dtypes:
        window(dtype, 16384, repeats)
    print("\n".join(f"wrong: {name}" for name in wrong) or "all outputs are right")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
