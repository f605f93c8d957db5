"""Why joint training stalls on STS-B: the exits' gradients, step by step.

    python -m benchmarks.gradient_conflict --model DIR --data_dir GLUE

For each recipe (`benchmarks/recipes.py`) it trains on one task and, every few steps, takes
each exit's own gradient on the parameters that exits share: its norm, its cosine with the others;
and looks at what the classifiers read: how much of a gradient the pooler's tanh lets through, and
how different the rows are. Without dropout, on the batch of that step, before the update.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks import command_line
from benchmarks.recipes import METRICS, RECIPES, config_of
from pabee_jax import InputError
from pabee_jax.data.batching import sequence_buckets, training_batch
from pabee_jax.data.load import load_task
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.models.parameters import merge, split, stacked
from pabee_jax.training.config import check
from pabee_jax.training.loss import exit_losses
from pabee_jax.training.start import labeled_examples, starting_point, tokenized
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import join_parts, phase_of, split_parts

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# What is recorded at a step, and how the figure calls it.
_ROWS = {
    "loss": "loss on {task}",
    "norm": "gradient norm",
    "cosine": "cosine with\nthe last exit's gradient",
    "passed": "passed by the pooler's tanh\n(mean of its derivative)",
    "spread": "distance of the rows in what\na classifier reads",
}


def make_probe(graph, pooler: str):
    """(parameters, batch) -> each exit's loss, its gradient's products with the others', what its
    tanh lets through (the mean of 1 - tanh^2), and how far rows are from each other in what its
    classifier reads (the root mean square of the standard deviations over the rows)."""

    def losses_of(shared, parts, batch):
        model = merge(graph, join_parts(parts | {"shared": shared}))
        return exit_losses(all_exit_logits(model, batch), batch["labels"], batch["valid"])

    def pooled_of(model, batch):
        hidden, mask = model.embed(batch)
        pooled = []
        for layer, group in enumerate(model.config.layer_groups):
            parameters = jax.tree.map(lambda leaf, group=group: leaf[group], model.groups)
            hidden = model.layer(parameters, hidden, mask)
            pooled.append(model.pooled(layer, hidden, mask))
        return jnp.stack(pooled)

    @jax.jit
    def probe(parameters, batch):
        parts = split_parts(parameters, pooler)
        losses = losses_of(parts["shared"], parts, batch)
        gradients = jax.jacrev(losses_of)(parts["shared"], parts, batch)
        flat = [leaf.reshape(len(losses), -1) for leaf in jax.tree.leaves(gradients)]
        products = sum(leaf @ leaf.T for leaf in flat)
        pooled = pooled_of(merge(graph, parameters), batch)
        passed = jnp.mean(1 - pooled**2, axis=(1, 2))
        return losses, products, passed, jnp.sqrt(jnp.mean(jnp.var(pooled, axis=1), axis=1))

    return probe


def probed(recipe: str, values) -> dict[str, Any]:
    """Trains with the recipe; what the probe found, every `values.every` steps."""
    config = config_of(recipe, values.task, values.seed, values.data_dir, values)
    check(config)
    task = load_task(config)
    examples = labeled_examples(task, "train")
    start = starting_point(config, task, examples)
    (data,) = tokenized(examples, start).values()
    graph, parameters = split(stacked(start.model))
    mesh = sharding.make_mesh(1)
    state = sharding.replicate(initial_state(parameters, config), mesh)
    train_step = make_train_step(graph, config, values.steps)
    probe, exits = make_probe(graph, config.pooler), start.model.config.num_hidden_layers
    buckets = sequence_buckets(config.max_seq_length)
    found = {"recipe": recipe, "step": [], **{name: [] for name in _ROWS}}
    for step in range(values.steps):
        batch, longest = (
            training_batch(data, config.batch_size, each, config.seed, step, config.order)
            for each in (buckets, buckets[-1:])
        )
        if step % values.every == 0:
            # At one length, so that the probe, which takes long to compile, is compiled once.
            longest = sharding.shard_batch(longest, mesh)
            losses, products, passed, spread = jax.device_get(probe(state.parameters, longest))
            norms = np.sqrt(np.diag(products))
            found["step"].append(step)
            found["loss"].append(losses.tolist())
            found["norm"].append(norms.tolist())
            found["cosine"].append((products / np.outer(norms, norms)).tolist())
            found["passed"].append(passed.tolist())
            found["spread"].append(spread.tolist())
            print(f"{recipe}, step {step}: losses {np.round(losses, 2)}", flush=True)
        phase = phase_of(config, step, values.steps, exits)
        state, _ = train_step(state, sharding.shard_batch(batch, mesh), phase)
    return found


def draw(records: list[dict[str, Any]], task: str, path: Path) -> None:
    """A column per recipe, a line per exit."""
    figure, axes = plt.subplots(
        len(_ROWS),
        len(records),
        figsize=(3.6 * len(records) + 1, 11),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for column, record in zip(axes.T, records, strict=True):
        exits = len(record["loss"][0])
        colors = plt.colormaps["viridis"](np.linspace(0, 0.9, exits))
        for name, axis in zip(_ROWS, column, strict=True):
            each = np.array(record[name])
            if name == "cosine":
                each = each[:, :, -1]  # With the last exit's.
            for exit in range(exits - (name == "cosine")):
                label = f"exit {exit + 1}"
                axis.plot(record["step"], each[:, exit], color=colors[exit], label=label)
            axis.spines[["top", "right"]].set_visible(False)
        column[0].set_title(record["recipe"])
        column[1].set_yscale("log")
        column[2].axhline(0, color="#999999", linewidth=0.8)
        column[-1].set_xlabel("optimiser step")
        column[3].set_ylim(0, 1)
        column[4].set_yscale("log")
    for label, axis in zip(_ROWS.values(), axes[:, 0], strict=True):
        axis.set_ylabel(label.format(task=task))
    axes[0, -1].legend(fontsize=7, frameon=False)
    figure.align_ylabels()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(record: dict[str, Any]) -> None:
    """Means over the run: norms, and the exits' pairwise cosines."""
    cosine, norm = np.mean(record["cosine"], axis=0), np.mean(record["norm"], axis=0)
    exits = range(1, len(norm) + 1)
    print(f"\n{record['recipe']}: means over the run, and the rows' distance at its end")
    header = ["exit", "norm", "distance", *(f"cosine with {exit}" for exit in exits)]
    last = record["spread"][-1]
    rows = [
        [exit, float(norm[exit - 1]), last[exit - 1], *map(float, cosine[exit - 1])]
        for exit in exits
    ]
    print(command_line.table(header, rows))


def main(values) -> None:
    if not (values.model and values.data_dir):
        raise InputError("--model and --data_dir are needed")
    records = [probed(recipe, values) for recipe in values.recipes]
    for record in records:
        show(record)
    draw(records, values.task, values.output / "gradient_conflict.png")
    command_line.save(values.output, "gradient_conflict", values, records)


def arguments():
    result = command_line.parser(__doc__.splitlines()[0], models="minilm", budget_minutes=5)
    result.add_argument("--model", default="", help="the pretrained encoder: a directory or hub id")
    result.add_argument("--data_dir", type=Path, help="the folder of GLUE's folders")
    result.add_argument("--task", choices=list(METRICS), default="stsb")
    result.add_argument(
        "--recipes", type=command_line.names_of(RECIPES), default=["pabee", "prior"]
    )
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--steps", type=command_line.positive_integer, default=200)
    result.add_argument("--every", type=command_line.positive_integer, default=10)
    result.add_argument("--learning_rate", type=float, default=1e-4)
    return result


if __name__ == "__main__":
    command_line.run(main, arguments())
