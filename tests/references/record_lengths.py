"""Records the logits of small random sequence classifiers of transformers for rows of every length.

    pip install torch==2.13.0 transformers==5.24.0 safetensors==0.8.0
    python tests/references/record_lengths.py [OUTPUT_DIRECTORY]

Without an argument, the script replaces the folder `lengths` next to it. It does not use pabee_jax.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from pytorch_classifiers import FAMILIES, make_classifier, outputs
from rows import row_of_length

# The most tokens of a row. ModernBERT has no table of positions, so that more cost nothing.
LONGEST = {"modernbert": 1024}
LAYERS = 3
_SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
_SIZES_OF = {
    "distilbert": {"dim": 16, "n_heads": 2, "hidden_dim": 24, "hidden_size": None},
    # Layer 1 is global, layers 2 and 3 are local: a token attends to 32 tokens on either side.
    "modernbert": {"local_attention": 64},
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
}
# Families whose first position is that after the id of the padding token.
_OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")


def main(folder: Path) -> None:
    for model_type in FAMILIES:
        longest = LONGEST.get(model_type, 512)
        fields = _SIZES | {"max_position_embeddings": longest + 2 * (model_type in _OFFSET)}
        fields |= _SIZES_OF.get(model_type, {})
        model = make_classifier(model_type, LAYERS, **fields)
        _sharpen(model)
        model.save_pretrained(folder / model_type)
        (folder / model_type / "model.safetensors").chmod(0o644)
        rows = [row_of_length(model_type, length) for length in range(1, longest + 1)]
        recorded = [outputs(model, row) for row in rows]
        expected = {
            name: np.concatenate([arrays[name] for arrays in recorded], axis=1)
            for name in ("logits", "mean_logits")
        }
        np.savez_compressed(folder / model_type / "expected.npz", **expected)


def _sharpen(model: torch.nn.Module) -> None:
    """Let every token attend to few tokens, so that the logits depend on each of them."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("query.weight", "q.weight", "q_lin.weight")):
            parameter.data *= 3
        if "Wqkv.weight" in name:
            parameter.data[: len(parameter) // 3] *= 3


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "lengths"))
