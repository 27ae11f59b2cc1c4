"""The command `raptax`: generate text, fetch models, say what is installed."""

import contextlib
import io
import itertools
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Annotated, cast

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from . import info as versions
from .generate import Sampler, generate_ids, text_of, until
from .generate.loop import check_numbers
from .generate.prompt import checked_stops
from .kernels.cpu.packed_linear import Precision
from .models import LanguageModel, load
from .models import fetch as fetch_model
from .models.families import Weights, weights_for
from .models.hub import cache_path

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
    except BrokenPipeError:  # the reader closed the pipe: typer exits with 1
        raise
    except (ValueError, OSError, MemoryError) as error:
        _err.print("[red]raptax:[/red]", end=" ")
        _err.print(str(error), soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(2) from None


def _keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache: the second run starts at once."""
    folder = cache_path() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        _err.print(
            f"{folder} cannot be written, so compiled programs are not kept; "
            "RAPTAX_CACHE may name another folder.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _text_of(prompt: str) -> str:
    """The prompt, or stdin without the newline that ends its last line."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"stdin is not UTF-8: byte 0x{error.object[error.start]:02x} at "
            f"{error.start}; iconv turns other encodings into it."
        ) from error


def _sampler(
    temperature: float | None, top_k: int | None, **limits: float | None
) -> Sampler:
    """Greedy, unless something says otherwise; 0 and -1 turn ``top_k`` off."""
    top_k = None if top_k in (0, -1) else top_k
    asked = [top_k, limits["top_p"], limits["min_p"]]
    if temperature is None and any(limit is not None for limit in asked):
        temperature = 1.0
    return Sampler.create(temperature=temperature, top_k=top_k, **limits)


def _show_version(asked: bool) -> bool:
    if asked:
        print(f"raptax {version('raptax')}")
        raise typer.Exit
    return asked


@app.callback()
def _common(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Print it and exit.",
        ),
    ] = False,
) -> None: ...


def _load(model: str, weights: Weights, precision: Precision) -> LanguageModel:
    told = TextColumn("{task.description}", markup=False)  # a path may hold brackets
    columns = told, BarColumn(), DownloadColumn()
    shown = _err.is_terminal  # elsewhere it would leave an empty line
    bars = Progress(*columns, console=_err, transient=True, disable=not shown)
    with bars, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _err.print(
            str(message), soft_wrap=True, highlight=False, markup=False
        )
        bar = bars.add_task(f"Loading {model}", total=None)
        return load(
            model,
            weights=weights,
            precision=precision,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads stdin.")],
    *,
    model: Annotated[
        str, typer.Option(help="smollm2, or the path of a GGUF file.")
    ] = "smollm2",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Stop after so many tokens.")
    ] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask, in the model's own chat format.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System message; implies --chat.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0, the default, takes the likeliest token; 1 if --top-k, "
            "--top-p or --min-p is given."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Of the k likeliest; 0 for all.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Of those, this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Relative to the best.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages repeating.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the sampler; a random one is printed.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="In memory: packed, codes, blocks or float32.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of what packed weights multiply: float32 or int8.")
    ] = "float32",
) -> None:
    """Continue PROMPT with a model, streaming to the terminal."""
    with _one_sentence():
        # All that can be wrong without the model, before it takes seconds to load.
        sampler = _sampler(
            temperature,
            top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        stops, text = checked_stops(stop or []), _text_of(prompt)
        check_numbers(max_tokens, seed or 0)
        form = weights_for(weights, precision)
        if seed is None:
            seed = secrets.randbits(32)
            if sampler.temperature is not None:
                _err.print(f"seed {seed}", style="dim", highlight=False)
        _keep_compiled_programs()
        loaded = _load(model, form, cast(Precision, precision))
        chat = chat or system is not None
        ids = _ids_of(loaded, text, chat, system)
        timed = _Timed(
            generate_ids(
                loaded.decoder,
                ids,
                max_tokens=max_tokens,
                sampler=sampler,
                seed=seed,
                stop=loaded.tokenizer.stop_ids,
            ),
            max_tokens,
        )
        pieces = until(text_of(timed, loaded.tokenizer, ids), stops)
        _stream(pieces if chat else itertools.chain([text], pieces), timed)


def _ids_of(
    model: LanguageModel, text: str, chat: bool, system: str | None
) -> list[int]:
    if not chat:
        return model.tokenizer.encode(text)
    said = [] if system is None else [{"role": "system", "content": system}]
    return model.tokenizer.encode_chat([*said, {"role": "user", "content": text}])


def _stream(pieces: Iterable[str], timed: "_Timed") -> None:
    """Prints text as it comes, and then how long it took."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may know ASCII alone
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        timed.interrupted = True
    print(flush=True)
    _err.print(timed.report(), style="dim", highlight=False)
    if timed.interrupted:
        raise typer.Exit(130)


class _Timed:
    """Passes tokens on and keeps the time."""

    def __init__(self, tokens: Iterable[int], most: int):
        self.tokens, self.count, self.most = tokens, 0, most
        self.interrupted = False
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
        if self.interrupted:
            return f"{told}; interrupted"
        return f"{told}; {'--max-tokens' if self.count == self.most else 'the end'}"


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
