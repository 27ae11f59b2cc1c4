"""Strict arrays: a test that relies on a silent promotion is a test that lies."""

import itertools
import os
from pathlib import Path

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


# Linux gives a process 65,530 memory mappings. A test's programs take about 230 of them
# and 13 MB, and where a mapping is refused the process dies.
TESTS_PER_CACHE = 80
_ran = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs_in_time():
    yield
    if next(_ran) % TESTS_PER_CACHE == 0:
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs_of_a_file():
    """No file of tests runs what another one compiled."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked():
    """Lets wrong shapes through to the library's own checks, as they are for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def model_path(name: str) -> Path:
    """A real model, fetched once. Where it cannot be had: skipped, but failed in CI."""
    from raptax.models.hub import fetch

    try:
        return fetch(name)
    except OSError as error:  # no network, no disk, or a download that was cut off
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"{name} cannot be had: {error}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return model_path("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    return model_path("gemma3")
