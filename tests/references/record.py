"""Creates small random models and records the outputs of PyTorch and Hugging Face's Flax classes.

Run this script by hand, in a separate virtual environment (Python 3.11). The tests read only the
recorded files.

    pip install torch==2.13.0 transformers==4.44.2 safetensors==0.8.0 numpy==1.26.4 scipy==1.13.1 \
        jax==0.4.30 jaxlib==0.4.30 flax==0.8.5 optax==0.2.5 orbax-checkpoint==0.6.4 chex==0.1.90
    python tests/references/record.py [OUTPUT_DIRECTORY]

Without an argument, the script replaces the files in its own folder. A second run writes the same
bytes. transformers 4.44 is one of the last releases with Flax classes.

README.md in the same folder describes the files. This script does not use pabee_jax.
"""

import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    BertConfig,
    FlaxAlbertModel,
    FlaxBertForPreTraining,
    FlaxBertModel,
    PretrainedConfig,
    get_linear_schedule_with_warmup,
)

from pytorch_model import Batch, ReferenceModel, draw_parameters

SEQUENCE_LENGTH = 11
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
}
ALBERT_SIZES = {"embedding_size": 16, "hidden_act": "gelu_new"}
# The Flax checkpoints and the training runs test names and updates, so a small model is enough.
SMALL = SIZES | {"hidden_size": 16, "intermediate_size": 24}
# With BERT's epsilon of 1e-12, a wrong epsilon would not change the outputs. With 1e-3 it does.
VISIBLE_LAYER_NORM_EPS = 1e-3
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TRAINING_STEPS = 6
TRAINING_BATCH = 8


def generator_for(name: str) -> torch.Generator:
    """Return a random number generator whose seed depends only on the folder's name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def make_batch(generator: torch.Generator, lengths: list[int], hole_in_row: int = -1) -> Batch:
    """Return a batch of random token ids; the second half of every row has token type 1.

    Padding has id 0, and no other position has id 0, because torch gives the embedding of id 0 no
    gradient.
    """
    shape = (len(lengths), SEQUENCE_LENGTH)
    positions = torch.arange(SEQUENCE_LENGTH).expand(shape)
    ends = torch.tensor(lengths)[:, None]
    valid = positions < ends
    input_ids = torch.randint(1, SIZES["vocab_size"], shape, generator=generator) * valid
    token_type_ids = (2 * positions >= ends) & valid
    attention_mask = valid.clone()
    if hole_in_row >= 0:
        attention_mask[hole_in_row, 4:6] = False
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask.long(),
        "token_type_ids": token_type_ids.long(),
    }


def as_numpy(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the tensors as int32 and float32 arrays, the dtypes that the tests expect."""
    return {
        name: array.detach().numpy().astype("float32" if array.is_floating_point() else "int32")
        for name, array in arrays.items()
    }


def make_config(model_type: str, sizes: dict, **fields: object) -> PretrainedConfig:
    if model_type == "bert":
        config = BertConfig(**(sizes | fields), attn_implementation="eager")
        config.architectures = ["BertForSequenceClassificationWithPabee"]
    else:
        config = AlbertConfig(**(ALBERT_SIZES | sizes | fields), attn_implementation="eager")
        config.architectures = ["AlbertForSequenceClassificationWithPabee"]
    return config


def save_checkpoint(folder: Path, model: ReferenceModel) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def model_configs() -> Iterator[tuple[str, PretrainedConfig]]:
    """Yield the folder name and the configuration of every recorded model."""
    for layers in (3, 12):
        fields = {"num_hidden_layers": layers, "num_labels": 3}
        if layers == 3:
            fields["layer_norm_eps"] = VISIBLE_LAYER_NORM_EPS
        yield f"bert-{layers}-layers", make_config("bert", SIZES, **fields)
        for groups, inner in ((1, 1), (2, 1), (1, 2), (2, 2)):
            config = make_config(
                "albert", SIZES, num_hidden_groups=groups, inner_group_num=inner, **fields
            )
            yield f"albert-{layers}-layers-{groups}-groups-{inner}-inner", config
    uneven = {"num_hidden_layers": 5, "num_hidden_groups": 2, "num_labels": 3}
    yield "albert-5-layers-2-groups-1-inner", make_config("albert", SIZES, **uneven)


@torch.no_grad()
def record_model(folder: Path, config: PretrainedConfig) -> None:
    """Save a model and its embeddings, hidden states and logits on a batch."""
    generator = generator_for(folder.name)
    model = ReferenceModel(config).eval()
    draw_parameters(model, generator)
    batch = make_batch(generator, lengths=[11, 8, 5, 2, 10], hole_in_row=4)
    hidden_states, logits = model(batch)
    save_checkpoint(folder, model)
    recorded = {
        "embeddings": hidden_states[0],
        "hidden_states": torch.stack(hidden_states[1:]),
        "logits": logits,
    }
    np.savez_compressed(folder / "expected.npz", **as_numpy(batch | recorded))


def draw_flax_parameters(params: dict, generator: torch.Generator) -> dict:
    """Draw a Flax parameter tree from the same distributions as `draw_parameters`."""
    flat = flatten_dict(params)
    for path in sorted(flat):
        noise = torch.randn(flat[path].shape, generator=generator).numpy()
        if path[-1] == "kernel":
            flat[path] = (noise / math.sqrt(noise.shape[0])).astype(np.float32)
        else:
            scale = 0.5 if path[-1] == "embedding" else 0.1
            flat[path] = np.float32(scale) * noise + np.float32(path[-1] == "scale")
    return unflatten_dict(flat)


def record_flax(folder: Path, config: PretrainedConfig) -> None:
    """Save a Hugging Face Flax checkpoint and the outputs of its encoder.

    BERT is saved with its pretraining heads, so names start with bert/ and cls/. ALBERT is saved as
    the encoder only, so names have no prefix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = generator_for(folder.name)
    batch = make_batch(generator, lengths=[11, 8, 5, 2, 10], hole_in_row=4)
    if config.model_type == "bert":
        model = FlaxBertForPreTraining(config, input_shape=(1, SEQUENCE_LENGTH))
        model.params = draw_flax_parameters(model.params, generator)
        encoder = FlaxBertModel(config, input_shape=(1, SEQUENCE_LENGTH))
        encoder.params = model.params["bert"]
    else:
        model = encoder = FlaxAlbertModel(config, input_shape=(1, SEQUENCE_LENGTH))
        model.params = draw_flax_parameters(model.params, generator)
    inputs = as_numpy(batch)
    outputs = encoder(**inputs, output_hidden_states=True)
    model.save_pretrained(folder)
    np.savez_compressed(
        folder / "expected.npz",
        **inputs,
        embeddings=np.asarray(outputs.hidden_states[0]),
        hidden_states=np.stack(outputs.hidden_states[1:]),
        pooler_output=np.asarray(outputs.pooler_output),
    )


def exit_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of every exit: squared error for 1 output, else cross-entropy."""
    if logits.shape[-1] == 1:
        losses = [nn.functional.mse_loss(exit_logits[:, 0], labels) for exit_logits in logits]
    else:
        losses = [nn.functional.cross_entropy(exit_logits, labels) for exit_logits in logits]
    return torch.stack(losses)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with weight decay for all parameters except biases and layer norms.

    ALBERT's full_layer_layer_norm is a layer norm too.
    """
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        is_exempt = name.endswith("bias") or id(parameter) in norms
        (no_decay if is_exempt else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, eps=1e-8)


def training_batches(generator: torch.Generator, num_labels: int) -> Iterator[Batch]:
    shape = (TRAINING_BATCH,)
    for _ in range(TRAINING_STEPS):
        lengths = torch.randint(4, SEQUENCE_LENGTH + 1, shape, generator=generator).tolist()
        batch = make_batch(generator, lengths)
        if num_labels == 1:
            batch["labels"] = 5 * torch.rand(shape, generator=generator)
        else:
            batch["labels"] = torch.randint(0, num_labels, shape, generator=generator)
        yield batch


def record_training(folder: Path, config: PretrainedConfig) -> None:
    """Record 6 steps of joint training without dropout.

    AdamW with gradients clipped to norm 1, on a schedule of 8 steps with 2 warm-up steps.
    """
    generator = generator_for(folder.name)
    model = ReferenceModel(config).eval()
    draw_parameters(model, generator)
    save_checkpoint(folder, model)
    batches = list(training_batches(generator, config.num_labels))
    optimizer = make_optimizer(model)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=8)
    weights = torch.arange(1.0, config.num_hidden_layers + 1)
    steps = []
    for batch in batches:
        inputs = {name: array for name, array in batch.items() if name != "labels"}
        losses = exit_losses(model(inputs)[1], batch["labels"])
        loss = (weights * losses).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = torch.tensor(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        steps.append({"loss": loss, "exit_losses": losses, "gradient_norm": norm, "rate": rate})
    names = {"loss": "losses", "gradient_norm": "gradient_norms", "rate": "learning_rates"}
    recorded = {names.get(n, n): torch.stack([step[n] for step in steps]) for n in steps[0]}
    np.savez_compressed(folder / "expected.npz", **as_numpy(recorded))
    stacked = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
    np.savez_compressed(folder / "batches.npz", **as_numpy(stacked))
    save_file(model.state_dict(), folder / "final.safetensors", metadata={"format": "pt"})


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    torch.set_num_threads(1)
    jax.config.update("jax_platforms", "cpu")
    for name, config in model_configs():
        record_model(output / "models" / name, config)
    bert = {"num_hidden_layers": 3}
    albert = bert | {"embedding_size": 8}
    record_flax(output / "flax" / "bert-for-pretraining", make_config("bert", SMALL, **bert))
    two_by_two = {"num_hidden_groups": 2, "inner_group_num": 2}
    record_flax(output / "flax" / "albert", make_config("albert", SMALL, **albert, **two_by_two))
    bert |= NO_DROPOUT | {"num_labels": 3}
    record_training(output / "training" / "bert-classification", make_config("bert", SMALL, **bert))
    albert |= NO_DROPOUT | {"classifier_dropout_prob": 0.0, "num_labels": 1}
    albert_config = make_config("albert", SMALL, **albert)
    record_training(output / "training" / "albert-regression", albert_config)


if __name__ == "__main__":
    main()
