"""Driver `loop`: the batch walks the layers together and stops when its last row has left.

For one row and for small batches: a row that has left goes on being computed until the slowest row
of its batch leaves.
"""

from jaxtyping import Array, Int

from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers.exit_rule import Exits
from pabee_jax.drivers.layer_loop import CONTROL, Control, apply_layer, run_layers
from pabee_jax.models.encoder import Batch, EarlyExitModel


def early_exit(
    model: EarlyExitModel,
    batch: Batch,
    criterion: ExitCriterion,
    row: Int[Array, " batch"] | None = None,
    *,
    control: Control = CONTROL,
) -> Exits:
    """Each row's exit layer (from 1) and the logits of that exit. To be used under `jit`.

    A row in which nothing may be attended to (padding of the batch) counts as having left before
    the first layer, so that it keeps no other row waiting; its exit layer is 0.

    `row` is each row's index in the call, which the criterion sees; absent, its index in the batch.
    """
    hidden, mask = model.embed(batch)

    def run_layer(layer, hidden, done):
        del done  # Freezing the rows that left would cost a copy; nothing reads them.
        hidden = apply_layer(model, layer, hidden, mask)
        return hidden, model.exit_logits(layer, hidden, mask)

    return run_layers(model, hidden, mask, criterion, row, run_layer, control)
