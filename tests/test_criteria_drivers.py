"""Every criterion gives a row the same exit layer and logits in every driver."""

import jax
import numpy as np
import pytest

from helpers import random_batch, run_on, tiny_model
from pabee_jax import replay
from pabee_jax.analysis.operating_points import within_rounding_margin
from pabee_jax.criteria import CRITERIA
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits

ROWS = 37


# A criterion sees only logits, so that most families need not be tested.
CASES = {"scores": ("albert", 1), "classes": ("albert", 3), "modernbert": ("modernbert", 3)}


@pytest.fixture(
    scope="module",
    params=[
        *("scores", "classes"),
        pytest.param("modernbert", marks=pytest.mark.slow),
    ],
)
def recorded(request):
    """A model, a batch, and the logits of every exit for this batch."""
    family, labels = CASES[request.param]
    model = tiny_model(family, labels=labels, num_hidden_layers=5)
    batch = random_batch(ROWS)
    batch["token_type_ids"] *= model.config.type_vocab_size > 1
    return model, batch, np.asarray(jax.jit(all_exit_logits)(model, batch))


# The criteria whose states and answers differ; the others are confidences, as max_probability is.
VARIED = {"consistency", "divergence", "max_probability", "patience", "vote"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in VARIED else pytest.mark.slow)
        for name in sorted(CRITERIA)
    ],
)
def test_a_row_has_the_same_exit_layer_and_logits_in_every_driver(recorded, name):
    model, batch, logits = recorded
    kind = CRITERIA[name]
    if logits.shape[2] == 1 and not kind.for_regression:
        pytest.skip("the criterion is for classification only")
    mesh = sharding.make_mesh(1)
    for family, settings in kind.families(logits, 7).items():
        setting = settings[len(settings) // 2]
        expected_layers, expected_logits = map(np.asarray, replay(setting, logits))
        clear = ~within_rounding_margin(setting, logits)
        assert clear.mean() > 0.8, "too few rows are compared; choose another setting"
        for chunk_rows in (None, 8):
            exit_layers, exit_logits = run_on(mesh, model, batch, setting, chunk_rows=chunk_rows)
            case = f"{name}, {family}, chunk_rows {chunk_rows} (None: loop)"
            np.testing.assert_array_equal(exit_layers[clear], expected_layers[clear], case)
            np.testing.assert_allclose(
                exit_logits[clear], expected_logits[clear], atol=2e-5, err_msg=case
            )
