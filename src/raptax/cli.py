"""The command `raptax`: generate text, fetch models, say what is installed."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from . import info as versions
from .models import LanguageModel, load
from .models import fetch as fetch_model
from .models.llama import Weights
from .models.published import cache_path
from .serving import Sampler, generate_ids, text_of, until
from .serving.prompt import checked_stops

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An attention stack for JAX, and a small language-model runner on top of it.",
)
_err = Console(stderr=True)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Turns what the user can mend into one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        _err.print("[red]raptax:[/red]", end=" ")
        _err.print(str(error), soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(2) from None


def _keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache: the second run starts at once."""
    jax.config.update("jax_compilation_cache_dir", str(cache_path() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _load(model: str, weights: Weights) -> LanguageModel:
    told = TextColumn("{task.description}", markup=False)  # a path may hold brackets
    columns = told, BarColumn(), DownloadColumn()
    shown = _err.is_terminal  # elsewhere it would leave an empty line
    with Progress(*columns, console=_err, transient=True, disable=not shown) as bars:
        bar = bars.add_task(f"Loading {model}", total=None)
        return load(
            model,
            weights=weights,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads stdin.")],
    *,
    model: Annotated[
        str, typer.Option(help="smollm2, or the path of a GGUF file.")
    ] = "smollm2",
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask, in the model's own chat format.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Of the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of those, this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Relative to the best.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages repeating.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="In memory: blocks, codes or float32.")
    ] = "codes",
) -> None:
    """Continue PROMPT with a model, streaming to the terminal."""
    with _one_sentence():
        _keep_compiled_programs()
        sampler = Sampler.create(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        stops = checked_stops(stop or [])
        text = sys.stdin.read() if prompt == "-" else prompt
        loaded = _load(model, weights)  # type: ignore[arg-type]
        if chat:
            ids = loaded.tokenizer.encode_chat([{"role": "user", "content": text}])
        else:
            ids = loaded.tokenizer.encode(text)
        timed = _Timed(
            generate_ids(
                loaded.decoder,
                ids,
                max_tokens=max_tokens,
                sampler=sampler,
                seed=seed,
                stop=loaded.tokenizer.stop_ids,
            )
        )
        if not chat:
            print(text, end="", flush=True)
        for piece in until(text_of(timed, loaded.tokenizer, ids), stops):
            print(piece, end="", flush=True)
        print()
        _err.print(timed.report(), style="dim", highlight=False)


class _Timed:
    """Passes tokens on and keeps the time."""

    def __init__(self, tokens: Iterable[int]):
        self.tokens, self.count = tokens, 0
        self.start = self.first = self.last = time.perf_counter()

    def __iter__(self) -> Iterator[int]:
        for token in self.tokens:
            self.last = time.perf_counter()
            self.count += 1
            if self.count == 1:
                self.first = self.last
            yield token

    def report(self) -> str:
        """Decode speed leaves out the first token, which waits for the prompt."""
        told = f"{self.count} tokens, the first after {self.first - self.start:.2f} s"
        if self.last > self.first:
            told += f", then {(self.count - 1) / (self.last - self.first):.1f} tokens/s"
        return told


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A published model, such as smollm2.")],
) -> None:
    """Download a published model once into the user's cache, and print its path."""
    with _one_sentence():
        print(fetch_model(name))


@app.command()
def info() -> None:
    """Print versions, devices, and whether the native kernels are there."""
    print(versions.report())
