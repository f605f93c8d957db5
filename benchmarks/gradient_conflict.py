"""The exits' gradients during joint training, which show why it stalls on STS-B.

    python -m benchmarks.gradient_conflict --model DIR --data_dir GLUE

The benchmark trains on one task with every recipe of --recipes (see benchmarks/recipes.py). Every
few steps, it computes the gradient of every exit's loss with respect to the parameters that exits
share, and records the gradient's norm and its cosine with the other exits' gradients. It also
records the mean derivative of the pooler's tanh and the distance of the rows in the classifiers'
input. These quantities are computed without dropout, on the batch of that step, before the update.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps

from benchmarks import command_line, figures
from benchmarks.recipes import METRICS, RECIPES, config_of
from pabee_jax import InputError
from pabee_jax.data.batching import training_batch, training_lengths
from pabee_jax.data.load import load_task
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.models.parameters import merge, split, stacked
from pabee_jax.training.config import check
from pabee_jax.training.loss import mean_over_rows, row_losses
from pabee_jax.training.start import labeled_examples, starting_point, tokenized
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import join_parts, phase_of, split_parts

# The quantities that are recorded at a step: their names in the JSON file, and their labels in the
# figure.
_QUANTITIES = {
    "loss": "loss on {task}",
    "norm": "gradient norm",
    "cosine": "cosine with\nthe last exit's gradient",
    "passed": "mean derivative of\nthe pooler's tanh",
    "spread": "distance of the rows\nin a classifier's input",
}


def make_probe(structure, pooler: str):
    """Return a compiled function from (parameters, batch) to the recorded quantities of every exit.

    Returns:
        A function that returns the exits' losses (L,), the products of their gradients (L, L), the
        mean derivative of the pooler's tanh, 1 - tanh^2 (L,), and the distance of the rows in the
        classifiers' input: the root mean square of the standard deviations over the rows (L,).
    """

    def losses_of(shared, parts, batch):
        model = merge(structure, join_parts(parts | {"shared": shared}))
        losses = row_losses(all_exit_logits(model, batch), batch["labels"])
        return mean_over_rows(losses, batch["valid"], batch["valid"].sum())

    def pooled_of(model, batch):
        hidden, mask, side = model.embed(batch)
        pooled = []
        for layer, group in enumerate(model.config.layer_groups):
            parameters = jax.tree.map(lambda leaf, group=group: leaf[group], model.groups)
            hidden = model.layer(parameters, hidden, mask, side.of_layer(layer))
            pooled.append(model.pooled(layer, model.exit_features(hidden, mask)))
        return jnp.stack(pooled)

    @jax.jit
    def probe(parameters, batch):
        parts = split_parts(parameters, pooler)
        losses = losses_of(parts["shared"], parts, batch)
        gradients = jax.jacrev(losses_of)(parts["shared"], parts, batch)
        flat = [leaf.reshape(len(losses), -1) for leaf in jax.tree.leaves(gradients)]
        products = sum(leaf @ leaf.T for leaf in flat)
        pooled = pooled_of(merge(structure, parameters), batch)
        tanh_derivative = jnp.mean(1 - pooled**2, axis=(1, 2))
        spread = jnp.sqrt(jnp.mean(jnp.var(pooled, axis=1), axis=1))
        return losses, products, tanh_derivative, spread

    return probe


def train_and_probe(recipe: str, options) -> dict[str, Any]:
    """Train with the recipe, and return the recorded quantities of every `options.every` steps."""
    config = config_of(recipe, options.task, options.seed, options.data_dir, options)
    check(config)
    task = load_task(config)
    examples = labeled_examples(task, "train")
    mesh = sharding.make_mesh(1)
    start = starting_point(config, task, examples, mesh)
    (data,) = tokenized(examples, start).values()
    structure, parameters = split(stacked(start.model))
    state = sharding.replicate(initial_state(parameters, config), mesh)
    train_step = make_train_step(structure, config, options.steps)
    probe, exits = make_probe(structure, config.pooler), start.model.config.num_hidden_layers
    buckets = training_lengths(config.max_seq_length, config.order)
    record = {"recipe": recipe, "step": [], **{name: [] for name in _QUANTITIES}}
    for step in range(options.steps):
        batch, padded_batch = (
            training_batch(data, config.batch_size, lengths, config.seed, step, config.order)
            for lengths in (buckets, buckets[-1:])
        )
        if step % options.every == 0:
            # The probe takes long to compile: with one sequence length it is compiled once.
            padded_batch = sharding.shard_batch(padded_batch, mesh)
            losses, products, tanh_derivative, spread = jax.device_get(
                probe(state.parameters, padded_batch)
            )
            norms = np.sqrt(np.diag(products))
            record["step"].append(step)
            record["loss"].append(losses.tolist())
            record["norm"].append(norms.tolist())
            record["cosine"].append((products / np.outer(norms, norms)).tolist())
            record["passed"].append(tanh_derivative.tolist())
            record["spread"].append(spread.tolist())
            print(f"{recipe}, step {step}: losses {np.round(losses, 2)}", flush=True)
        phase = phase_of(config, step, options.steps, exits)
        state, _ = train_step(state, sharding.shard_batch(batch, mesh), phase)
    return record


def draw(records: list[dict[str, Any]], task: str, path: Path) -> None:
    """Draw a column per recipe, a row per quantity and a line per exit."""
    figure, axes = figures.panels(len(_QUANTITIES) * len(records), height=1.9, columns=len(records))
    rows = [axes[start : start + len(records)] for start in range(0, len(axes), len(records))]
    for row, (name, label) in zip(rows, _QUANTITIES.items(), strict=True):
        for axis in row[1:]:
            axis.sharey(row[0])
        for axis, record in zip(row, records, strict=True):
            exits = len(record["loss"][0])
            colors = colormaps["viridis"](np.linspace(0, 0.9, exits))
            values = np.array(record[name])
            if name == "cosine":
                values = values[:, :-1, -1]  # Of the other exits with the last exit's gradient.
                axis.axhline(0, color=figures.GRAY, linewidth=0.8)
            for exit, line in enumerate(values.T):
                axis.plot(record["step"], line, color=colors[exit], label=f"exit {exit + 1}")
            if name in ("norm", "spread"):
                axis.set_yscale("log")
            if name == "passed":
                axis.set_ylim(0, 1.05)
            axis.label_outer()
        row[0].set_ylabel(label.format(task=task), fontsize=9)
    for axis, record in zip(rows[0], records, strict=True):
        axis.set_title(record["recipe"])
    for axis in rows[-1]:
        axis.set_xlabel("optimizer step")
    figure.align_ylabels()
    figures.save(figure, path, legend_columns=6)


def print_means(record: dict[str, Any]) -> None:
    """Print the mean gradient norm and cosines of every exit, and the rows' final distance."""
    cosine, norm = np.mean(record["cosine"], axis=0), np.mean(record["norm"], axis=0)
    exits = range(1, len(norm) + 1)
    print(f"\n{record['recipe']}: means over the run, and the distance of the rows at its end")
    header = ["exit", "norm", "distance", *(f"cosine with {exit}" for exit in exits)]
    last = record["spread"][-1]
    rows = [
        [exit, float(norm[exit - 1]), last[exit - 1], *map(float, cosine[exit - 1])]
        for exit in exits
    ]
    print(command_line.table(header, rows))


def main(options) -> None:
    if not (options.model and options.data_dir):
        raise InputError("--model or --data_dir is missing: give both")
    records = [train_and_probe(recipe, options) for recipe in options.recipes]
    for record in records:
        print_means(record)
    draw(records, options.task, options.output / "gradient_conflict.png")
    command_line.save(options.output, "gradient_conflict", options, records)


def make_parser():
    parser = command_line.base_parser(__doc__)
    command_line.add_pretrained_model(parser)
    command_line.add_dtype(parser)
    command_line.add_compilation_cache(parser)
    parser.add_argument("--task", choices=list(METRICS), default="stsb")
    parser.add_argument(
        "--recipes", type=command_line.names_of(RECIPES), default=["pabee", "prior"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=command_line.positive_integer, default=200)
    parser.add_argument(
        "--every",
        type=command_line.positive_integer,
        default=10,
        help="steps from one record to the next (default: %(default)s)",
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
