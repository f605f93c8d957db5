"""The PyTorch reference model: a Hugging Face encoder with internal classifiers.

Requires torch and transformers, and runs with transformers 4.44 (which record.py requires) and 5.
This file does not use pabee_jax.
"""

import torch
from torch import Tensor, nn
from transformers import AlbertModel, BertModel, PretrainedConfig

Batch = dict[str, Tensor]


class ReferenceModel(nn.Module):
    """BertModel or AlbertModel with a linear classifier on every layer, under PABEE's names.

    transformers runs the encoder. Hooks on its layers (ALBERT: layer groups) record the input of
    the first layer and the output of every layer. The `hidden_states` of transformers cannot be
    used: for ALBERT, they have the output of every group in transformers 4, and the output of every
    inner layer in transformers 5.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config
        if config.model_type == "bert":
            self.bert = BertModel(config)
            layers = self.bert.encoder.layer
        else:
            self.albert = AlbertModel(config)
            layers = self.albert.encoder.albert_layer_groups
        for layer in layers:
            layer.register_forward_pre_hook(self._before_layer)
            layer.register_forward_hook(self._after_layer)
        self.classifiers = nn.ModuleList(
            nn.Linear(config.hidden_size, config.num_labels)
            for _ in range(config.num_hidden_layers)
        )

    def forward(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Return the first layer's input followed by every layer's output, and all exit logits."""
        self._hidden_states: list[Tensor] = []
        getattr(self, self.config.model_type)(**batch)
        exits = zip(self.classifiers, self._hidden_states[1:], strict=True)
        logits = [classifier(self._pool(hidden)) for classifier, hidden in exits]
        return self._hidden_states, torch.stack(logits)

    def _pool(self, hidden: Tensor) -> Tensor:
        if self.config.model_type == "bert":
            return self.bert.pooler(hidden)
        return torch.tanh(self.albert.pooler(hidden[:, 0]))

    def _before_layer(self, layer: nn.Module, arguments: tuple) -> tuple:
        if not self._hidden_states:
            self._hidden_states.append(arguments[0])
        if self.config.model_type == "albert" and len(arguments) > 2:
            # transformers 4 slices its default head mask to num_hidden_layers // num_hidden_groups
            # entries and then reads inner_group_num entries. This raises an IndexError for 3 layers
            # in 2 groups of 2 inner layers.
            no_head_mask = [None] * self.config.inner_group_num
            return (*arguments[:2], no_head_mask, *arguments[3:])
        return arguments

    def _after_layer(self, layer: nn.Module, arguments: tuple, output: tuple | Tensor) -> None:
        self._hidden_states.append(output[0] if isinstance(output, tuple) else output)


def draw_parameters(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter at random.

    A parameter that is missing, swapped or transposed then changes the outputs.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data = 0.5 * torch.randn(module.weight.shape, generator=generator)
        elif isinstance(module, nn.LayerNorm | nn.Linear):
            noise = torch.randn(module.weight.shape, generator=generator)
            is_norm = isinstance(module, nn.LayerNorm)
            module.weight.data = 1 + 0.1 * noise if is_norm else noise / noise.shape[1] ** 0.5
            module.bias.data = 0.1 * torch.randn(module.bias.shape, generator=generator)
