"""Strict arrays: a test that relies on a silent promotion is a test that lies."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The smallest real model, fetched once. Without it: skipped here, failed in CI."""
    from raptax.models.fetch import fetch

    try:
        return fetch("smollm2")
    except OSError as error:  # no network, no disk, or a download that was cut off
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"smollm2 cannot be had: {error}")
