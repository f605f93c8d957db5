"""Every criterion gives each row the same exit and answer in every driver."""

import jax
import numpy as np
import pytest

from helpers import random_batch, run_on, tiny_model
from pabee_jax import replay
from pabee_jax.analysis.operating_points import hangs_on_rounding
from pabee_jax.criteria import CRITERIA
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits

ROWS = 37


@pytest.fixture(scope="module", params=[1, 3], ids=["scores", "classes"])
def recorded(request):
    """A model, rows, and the logits of every exit."""
    model = tiny_model("albert", labels=request.param, num_hidden_layers=5)
    batch = random_batch(ROWS)
    return model, batch, np.asarray(jax.jit(all_exit_logits)(model, batch))


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_same_exit_in_every_driver(recorded, name):
    model, batch, logits = recorded
    kind = CRITERIA[name]
    if logits.shape[2] == 1 and not kind.for_regression:
        pytest.skip("for classes")
    mesh = sharding.make_mesh(1)
    for family, settings in kind.families(logits, 7).items():
        setting = settings[len(settings) // 2]
        exits, answers = map(np.asarray, replay(setting, logits))
        clear = ~hangs_on_rounding(setting, logits)
        assert clear.mean() > 0.8, "almost nothing is compared"
        for chunk_size in (None, 8):
            found_exits, found = run_on(mesh, model, batch, setting, chunk_size=chunk_size)
            about = f"{name}, {family}, chunk_size {chunk_size} (None: loop)"
            np.testing.assert_array_equal(found_exits[clear], exits[clear], about)
            np.testing.assert_allclose(found[clear], answers[clear], atol=2e-5, err_msg=about)
