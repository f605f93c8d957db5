"""A finished run directory and the tokenized dev set of its task."""

from pathlib import Path

from pabee_jax.checkpoints.pretrained import Pretrained, load_pretrained
from pabee_jax.data.dataset import Dataset
from pabee_jax.errors import InputError


def dev_set(checkpoint: str, dtype: str) -> tuple[Pretrained, Dataset]:
    """Return the checkpoint of a run, and the dev rows of the data that the run was trained on.

    Raises:
        InputError: `checkpoint` is not a run directory, or its data cannot be read.
    """
    from pabee_jax.data.load import load_task
    from pabee_jax.training import run_directory

    directory = Path(checkpoint).expanduser()
    if not (directory / run_directory.CONFIG_FILE).is_file():
        raise InputError(
            f"--checkpoint {checkpoint} is not a run directory: give the --workdir of a finished "
            "pabee-jax train"
        )
    config = run_directory.read_config(directory)
    pretrained = load_pretrained(str(directory), dtype=dtype).with_max_length(config.max_seq_length)
    parts = load_task(config, pretrained.label_names).read("dev").values()
    texts = [text for part in parts for text in part.texts]
    pairs = [pair for part in parts for pair in part.pairs or [None] * len(part.texts)]
    return pretrained, pretrained.encode(texts, pairs)
