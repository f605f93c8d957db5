"""The rows of one call of `predict`: checked, and tokenized block by block."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.data.batching import prefetched
from pabee_jax.data.dataset import Dataset
from pabee_jax.inference.inputs import Text, Tokens, checked_texts, checked_tokens

_ROWS_PER_BLOCK = 256  # Number of texts that are tokenized at a time.


class RowSource(NamedTuple):
    """The rows of one call, in blocks.

    Attributes:
        num_rows: number of rows.
        longest: an upper bound for the number of tokens of a row.
        limit: the longest sequence length at which the rows run.
        blocks: the rows, in blocks of `_ROWS_PER_BLOCK`. Iterating tokenizes the texts of a block,
            which overlaps with the device's work on earlier blocks.
    """

    num_rows: int
    longest: int
    limit: int
    blocks: Iterable[Dataset]


def tokenize(pretrained: Pretrained, inputs: Sequence[Text] | Tokens | Dataset) -> Dataset:
    """Tokenize texts, or check tokenized rows; return the rows of a `Dataset` unchanged.

    Raises:
        InputError: the inputs are empty or cannot be used.
    """
    if isinstance(inputs, Dataset | Mapping):
        return checked_tokens(inputs, pretrained.model.config)
    texts, pairs = checked_texts(inputs)
    return pretrained.encode(texts, pairs)


def row_source(pretrained: Pretrained, inputs: Sequence[Text] | Tokens | Dataset) -> RowSource:
    """Check the inputs; return their rows in blocks, which are tokenized on iteration.

    Raises:
        InputError: the inputs are empty or cannot be used.
    """
    if isinstance(inputs, Dataset | Mapping):
        dataset = tokenize(pretrained, inputs)
        num_rows, longest = len(dataset), int(dataset.lengths.max())
        read_block = dataset.take
    else:
        texts, pairs = checked_texts(inputs)
        num_rows, longest = len(texts), 0

        def read_block(rows):
            return pretrained.encode(texts[rows], pairs[rows])

    starts = range(0, num_rows, _ROWS_PER_BLOCK)
    blocks = (read_block(slice(start, start + _ROWS_PER_BLOCK)) for start in starts)
    if num_rows > _ROWS_PER_BLOCK:
        blocks = prefetched(blocks)
    limit = pretrained.max_length
    if longest > limit:  # One more set of sequence lengths, whatever the lengths of the rows.
        limit = pretrained.model.config.max_length
    return RowSource(num_rows, longest or pretrained.max_length, limit, blocks)
