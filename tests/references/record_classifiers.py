"""Records small random sequence classifiers of transformers and what their layers compute.

    pip install torch==2.13.0 transformers==5.24.0 safetensors==0.8.0
    python tests/references/record_classifiers.py [OUTPUT_DIRECTORY]

Without an argument, the script replaces the folder `classifiers` next to it. It does not use
pabee_jax.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from pytorch_classifiers import FAMILIES, make_batch, make_classifier, outputs


def main(folder: Path) -> None:
    for model_type in FAMILIES:
        # Four layers, so that ModernBERT has two global layers, and local layers between them.
        model, batch = make_classifier(model_type, layers=4), make_batch(model_type)
        model.save_pretrained(folder / model_type)
        expected = batch | outputs(model, batch)
        if model_type == "mpnet":
            distances = torch.arange(-299, 300)
            buckets = model.mpnet.encoder.relative_position_bucket(distances)
            expected["buckets"] = buckets.numpy()
        np.savez_compressed(folder / model_type / "expected.npz", **expected)
        (folder / model_type / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "classifiers"))
