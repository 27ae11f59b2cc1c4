"""What `raptax info` prints: what is installed, what it runs on, what is missing."""

import platform
from importlib.metadata import version

import jax

from .kernels.cpu import library as native

PACKAGES = ("raptax", "jax", "jaxlib", "flax", "numpy")


def _devices() -> str:
    try:
        return ", ".join(str(device) for device in jax.devices())
    except RuntimeError as error:  # JAX was told to use a platform that is not there
        return f"none ({error})"


def report() -> str:
    """Versions, devices and native kernels, one line each. Starts JAX's backend."""
    reason = native.missing_reason()
    rows = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: version(package) for package in PACKAGES},
        "devices": _devices(),
        "native kernels": "yes" if reason is None else f"no: {reason}",
    }
    return "\n".join(f"{name:16}{value}" for name, value in rows.items())
