"""The library of C++ kernels: found, loaded, and its handlers registered with XLA.

The library is loaded and its handlers are registered when first asked for, so that
importing raptax costs nothing and works where it could not be built.
"""

import ctypes
import functools
from importlib import resources

import jax
from jaxtyping import Array, Int32

from ..._core.errors import Unsupported

# The handlers of csrc/ffi/: a name in C++ and in XLA.
HANDLERS = (
    "raptax_probe",
    "raptax_run_program",
    "raptax_forward",
    "raptax_backward",
    "raptax_paged",
    "raptax_packed_linear",
)


@functools.cache
def missing_reason() -> str | None:
    """Why the native kernels cannot be called, in one sentence; None if they can."""
    try:
        folder = resources.files("raptax_native")
    except ModuleNotFoundError:
        return (
            "raptax was installed without its native library, most likely because "
            "there was no C++ compiler; RAPTAX_REQUIRE_NATIVE=1 pip install shows why"
        )
    try:
        with resources.as_file(folder / "raptax_native.so") as path:
            library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native library could not be loaded: {error}"
    missing = [name for name in HANDLERS if not hasattr(library, name)]
    if missing:
        return f"the native library is older than raptax and lacks {', '.join(missing)}"
    for name in HANDLERS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None


def available() -> bool:
    """Whether the native kernels can be called; loads them when first asked."""
    return missing_reason() is None


def probe(x: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Computes ``x + 1`` in C++: proof that a jitted program reaches the library.

    Raises:
        Unsupported: The library is missing.
    """
    reason = missing_reason()
    if reason is not None:
        raise Unsupported(f"probe needs the native kernels: {reason}.")
    return jax.ffi.ffi_call("raptax_probe", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
