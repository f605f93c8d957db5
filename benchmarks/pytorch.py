"""The baseline: the encoder of PyTorch's `transformers`, with the same weights, at full depth."""

from collections.abc import Callable, Iterable

import numpy as np

from pabee_jax.checkpoints.names import to_tensors
from pabee_jax.errors import InputError
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel


def is_installed() -> bool:
    """Return whether PyTorch can be imported."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def make_forward(model: EarlyExitModel, dtype: str = "float32") -> Callable[[dict], np.ndarray]:
    """Return a function from a batch of NumPy arrays to the last exit's logits.

    PyTorch runs on a GPU if it has access to one, otherwise on the CPU. The function waits for its
    result.
    """
    import torch

    encoder, classifiers, device = _load(model, dtype)
    encoder.eval()
    kernel, bias = classifiers[-1]

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            inputs = {
                name: torch.from_numpy(value).long().to(device) for name, value in batch.items()
            }
            pooled = encoder(**inputs).pooler_output.float()
            return (pooled @ kernel.T + bias).cpu().numpy()

    return run


def make_training_step(
    model: EarlyExitModel, batch: dict[str, np.ndarray], dtype: str = "float32"
) -> Callable[[], None]:
    """Return a function that runs one AdamW step, with dropout, and waits for it.

    The loss is PABEE's joint loss over all exits.
    """
    import torch

    encoder, classifiers, device = _load(model, "float32")
    encoder.train()
    parameters = [value.requires_grad_() for pair in classifiers for value in pair]
    parameters += encoder.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    inputs = {
        name: torch.from_numpy(batch[name]).long().to(device)
        for name in ("input_ids", "attention_mask", "token_type_ids", "labels")
    }
    labels = inputs.pop("labels")
    rate = model.config.exit_dropout_prob
    exit_weights = range(1, len(classifiers) + 1)

    def step() -> None:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            outputs = encoder(**inputs, output_hidden_states=True)
        # ALBERT records the output of every inner layer; the last one of a group is its output.
        states = outputs.hidden_states[1 :: model.config.inner_group_num][: len(classifiers)]
        losses = []
        for hidden, (kernel, bias) in zip(states, classifiers, strict=True):
            pooled = _pool(encoder, hidden.float())
            pooled = torch.nn.functional.dropout(pooled, rate)
            losses.append(torch.nn.functional.cross_entropy(pooled @ kernel.T + bias, labels))
        pairs = zip(exit_weights, losses, strict=True)
        loss = sum(weight * exit_loss for weight, exit_loss in pairs) / sum(exit_weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()

    return step


def _pool(encoder, hidden):
    import torch

    if isinstance(encoder.pooler, torch.nn.Linear):  # ALBERT's pooler is not a module.
        return torch.tanh(encoder.pooler(hidden[:, 0]))
    return encoder.pooler(hidden)


def batches_sorted_by_length(
    lengths: np.ndarray, batch: dict[str, np.ndarray], batch_size: int
) -> Iterable[dict[str, np.ndarray]]:
    """Yield batches of rows sorted by length; every batch is as wide as its longest row."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = int(lengths[rows].max())
        yield {name: values[rows, :width] for name, values in batch.items()}


def _load(model: EarlyExitModel, dtype: str):
    """Return the encoder with the model's weights, every exit's (kernel, bias), and the device."""
    if not model.config.is_pabee:
        raise InputError(
            "PyTorch PABEE cannot run these exits (a pooler per exit, or mean pooling): add "
            "--no-torch"
        )
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {
        name: torch.from_numpy(np.array(value, np.float32)).to(device)
        for name, value in to_tensors(model).items()
    }
    prefix = f"{model.config.family}."
    encoder = _encoder(model.config)
    missing, _ = encoder.load_state_dict(
        {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        },
        strict=False,
    )
    assert not [name for name in missing if "position_ids" not in name], missing
    classifiers = [
        (tensors[f"classifiers.{index}.weight"], tensors[f"classifiers.{index}.bias"])
        for index in range(model.config.num_hidden_layers)
    ]
    return encoder.to(device, getattr(torch, dtype)), classifiers, device


def _encoder(config: ModelConfig):
    import transformers

    classes = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "albert": (transformers.AlbertConfig, transformers.AlbertModel),
    }
    config_class, model_class = classes[config.family]
    return model_class(
        config_class(
            vocab_size=config.vocab_size,
            embedding_size=config.embedding_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_hidden_groups=config.num_hidden_groups,
            inner_group_num=config.inner_group_num,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            layer_norm_eps=config.layer_norm_eps,
        )
    )
