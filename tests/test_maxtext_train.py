"""Layers of `raptax.compat.maxtext` learn a text, alone and on a mesh."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_layers_learn_a_text_as_nnx_as_linen_and_on_a_mesh():
    command = [sys.executable, "-m", "tests.maxtext_train", "LICENSE", "200"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses["devices"] == 4
    for name in ("nnx", "linen", "mesh"):
        assert len(losses[name]) == 200
        assert np.isfinite(losses[name]).all()
        assert np.mean(losses[name][-20:]) < 0.65 * losses[name][0]
    np.testing.assert_allclose(losses["linen"], losses["nnx"], rtol=0, atol=1e-6)
    # Sums over devices round otherwise, and training may double such differences.
    np.testing.assert_allclose(losses["mesh"], losses["nnx"], rtol=0, atol=1e-3)
