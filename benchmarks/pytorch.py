"""PyTorch's `transformers` encoder on the same weights at full depth: what people would use."""

from collections.abc import Callable, Iterable

import numpy as np

from pabee_jax.checkpoints.names import to_tensors
from pabee_jax.errors import InputError
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel


def is_installed() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def last_exit(model: EarlyExitModel, dtype: str = "float32") -> Callable[[dict], np.ndarray]:
    """A function: a batch of numpy arrays -> the last exit's logits, through PyTorch.

    Runs on a GPU if PyTorch sees one, otherwise on the CPU. Returns after the result is there.
    """
    import torch

    encoder, classifiers, device = _loaded(model, dtype)
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


def training_step(
    model: EarlyExitModel, batch: dict[str, np.ndarray], dtype: str = "float32"
) -> Callable[[], None]:
    """A call that makes one AdamW step on the joint loss of all exits, with dropout, and waits."""
    import torch

    encoder, classifiers, device = _loaded(model, "float32")
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
    weights_of_exits = range(1, len(classifiers) + 1)

    def step() -> None:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            outputs = encoder(**inputs, output_hidden_states=True)
        # ALBERT records every inner layer; a group's output is its last.
        states = outputs.hidden_states[1 :: model.config.inner_group_num][: len(classifiers)]
        losses = []
        for hidden, (kernel, bias) in zip(states, classifiers, strict=True):
            pooled = _pooled(encoder, hidden.float())
            pooled = torch.nn.functional.dropout(pooled, rate)
            losses.append(torch.nn.functional.cross_entropy(pooled @ kernel.T + bias, labels))
        pairs = zip(weights_of_exits, losses, strict=True)
        loss = sum(weight * each for weight, each in pairs) / sum(weights_of_exits)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()

    return step


def _pooled(encoder, hidden):
    import torch

    if isinstance(encoder.pooler, torch.nn.Linear):  # ALBERT's has no module of its own.
        return torch.tanh(encoder.pooler(hidden[:, 0]))
    return encoder.pooler(hidden)


def length_sorted(
    lengths: np.ndarray, batch: dict[str, np.ndarray], batch_size: int
) -> Iterable[dict[str, np.ndarray]]:
    """Batches of rows sorted by length, each padded to its longest row."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = int(lengths[rows].max())
        yield {name: values[rows, :width] for name, values in batch.items()}


def _loaded(model: EarlyExitModel, dtype: str):
    """The encoder with the model's weights, each exit's (kernel, bias), and the device."""
    if not model.config.is_pabee:
        raise InputError(
            "PyTorch PABEE has no such exits (a pooler for each, or the mean over the tokens): add "
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

    kinds = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "albert": (transformers.AlbertConfig, transformers.AlbertModel),
    }
    settings, model = kinds[config.family]
    return model(
        settings(
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
