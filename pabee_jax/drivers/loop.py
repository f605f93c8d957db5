"""Driver `loop`: runs the whole batch layer by layer and stops when its last row has exited.

For a single row and for small batches: the loop also computes the rows that have exited, until the
slowest row of the batch exits.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers.exit_rule import Exits
from pabee_jax.drivers.layer_loop import CONTROL, Control, on_group, run_layers
from pabee_jax.models.encoder import Batch, EarlyExitModel


def early_exit(
    model: EarlyExitModel,
    batch: Batch,
    criterion: ExitCriterion,
    row: Int[Array, " batch"] | None = None,
    *,
    control: Control = CONTROL,
) -> Exits:
    """Return each row's exit layer (from 1) and the logits of that exit. Call it under `jit`.

    A row whose mask is all zeros (padding of the batch) counts as having exited before the first
    layer, so that no other row waits for it; its exit layer is 0.

    Args:
        model: the encoder with its exits, such as `EarlyExitClassifier.model`.
        batch: `input_ids` and optionally `attention_mask` and `token_type_ids`, each (rows, tokens)
            int32; `EarlyExitClassifier.tokenize` returns such a batch.
        criterion: decides when a row exits; pass it through `criteria.as_arrays`, so that another
            threshold does not recompile.
        row: each row's index in the call, for the criterion; absent, its index in the batch.
        control: how the loop is compiled.

    Returns:
        The exit layers, (rows,) int32, and the logits, (rows, classes) float32.

    Example:
        >>> classifier = EarlyExitClassifier.from_pretrained("runs/mrpc")
        >>> batch = classifier.tokenize(["a text", "another text"])
        >>> run = jax.jit(early_exit)
        >>> exit_layers, logits = run(classifier.model, batch, as_arrays(Patience(2)))
        >>> exit_layers.shape, logits.shape
        ((2,), (2, 2))
    """
    hidden, mask, side = model.embed(batch)

    def run_layer(layer, hidden, done):
        # Freezing the rows that have exited would cost a copy, and their values are not used.
        del done
        hidden = on_group(model, layer, model.layer, hidden, mask, side.of_layer(layer))
        return hidden, model.exit_logits(layer, hidden, mask)

    done = ~jnp.any(mask, axis=1)
    return run_layers(model, hidden, done, criterion, row, run_layer, control)
