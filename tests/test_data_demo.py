"""Properties of the demo task's sentences, and their identity on every machine."""

import collections
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from pabee_jax.data import demo

BAD = {
    *("dull", "dreadful", "terrible", "awful", "boring", "horrible", "poor", "disappointing"),
    *("tedious", "unpleasant", "mediocre", "forgettable", "dismal", "bad"),
}
NEGATIONS = re.compile(r"doubt|not|no critic|nobody would|everyone denies|false|lie|wrong")
DIGEST = """
import hashlib
from pabee_jax.data import demo
read = demo.task().read
splits = [read(split)[split] for split in ("train", "dev", "test")]
rows = [(e.texts, e.kinds, e.ids, e.labels.tolist()) for e in splits]
print(hashlib.sha256(repr((rows, demo.vocabulary())).encode()).hexdigest())
"""
# SHA-256 of the released data: the results in the documentation were measured on these sentences.
RELEASED_DIGEST = "98bcf63330dd60c3994ceb8e5b626b014cafadaa53b4b84b5e1f849cfa66d25a"


@pytest.fixture(scope="module")
def splits():
    task = demo.task()
    return {split: task.read(split)[split] for split in ("train", "dev", "test")}


def test_splits_have_their_sizes_and_share_no_sentence(splits):
    for split, size in demo.SPLIT_SIZES.items():
        assert len(splits[split]) == len(splits[split].labels) == size, split
    texts = [text for examples in splits.values() for text in examples.texts]
    assert len(set(texts)) == len(texts), "a sentence occurs twice; no split may repeat a sentence"


def test_labels_are_balanced_in_every_kind(splits):
    for split, examples in splits.items():
        assert set(examples.kinds) == set(demo.KINDS)
        counts = collections.Counter(zip(examples.kinds, examples.labels.tolist(), strict=True))
        for kind in demo.KINDS:
            assert counts[kind, 0] == counts[kind, 1], (
                f"{split}: the kind {kind!r} predicts the label; balance its labels"
            )


def test_a_bag_of_words_predicts_hard_kinds_at_chance(splits):
    train, dev = splits["train"], splits["dev"]
    words = CountVectorizer(token_pattern=r"\w+").fit(train.texts)
    for kind in ("reported speech", "contrast", "nested negation", "disagreement"):
        of_kind = {name: np.array(e.kinds) == kind for name, e in (("train", train), ("dev", dev))}
        counts = words.transform(train.texts)[of_kind["train"]]
        model = LogisticRegression(max_iter=500).fit(counts, train.labels[of_kind["train"]])
        predictions = model.predict(words.transform(dev.texts)[of_kind["dev"]])
        accuracy = (predictions == dev.labels[of_kind["dev"]]).mean()
        assert 0.4 < accuracy < 0.6, (
            f"single words predict the label of {kind!r} with accuracy {accuracy:.2f}: too easy"
        )


def clause_is_positive(clause: str) -> bool:
    """Return the sentiment of a clause such as "the film was not dull"."""
    negated = re.search(r" was (not|never|hardly|scarcely|anything but|far from) ", clause)
    return (clause.split()[-1] not in BAD) != bool(negated)


def review_is_positive(review: str) -> bool:
    """Return the sentiment of a review from its wording alone, without the generator's code."""
    parts = review.lower().rstrip(".").split(", ")
    if re.search(r" was (right|correct|spot on|wrong|mistaken|in error)$", parts[-1]):
        trusted = re.search(r" (right|correct|spot on)$", parts[-1]) is not None
        return clause_is_positive(claim_of(parts)) == trusted
    if " that " in parts[0] and not parts[0].startswith("as far"):
        *wrappers, clause = parts[0].split(" that ")
        negations = sum(NEGATIONS.search(wrapper) is not None for wrapper in wrappers)
        return clause_is_positive(clause) != (negations % 2 == 1)
    if parts[-1].startswith(("although", "even though", "even if", "though", "while", "granted")):
        return clause_is_positive(parts[0])
    return clause_is_positive(parts[-1])


def claim_of(parts: list[str]) -> str:
    """Return the claim that the last part calls right or wrong: "my aunt called the film dull"."""
    return parts[1] if re.match("and the (second|latter) ", parts[-1]) else parts[0]


def test_the_wording_of_every_review_agrees_with_its_label(splits):
    for examples in splits.values():
        for text, label in zip(examples.texts, examples.labels, strict=True):
            assert review_is_positive(text) == bool(label), f"{text!r} has label {label}"


def test_data_are_the_same_in_every_process():
    digests = [
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert digests == [RELEASED_DIGEST] * 2, (
        "the sentences depend on the process or were changed; after an intended change, measure "
        "the demo's results again and record the new digest"
    )


def test_every_token_is_in_the_vocabulary(splits):
    tokenizer, vocabulary = demo.tokenizer(), demo.vocabulary()
    assert tuple(vocabulary[:5]) == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert list(vocabulary[5:]) == sorted(set(vocabulary[5:]))
    for examples in splits.values():
        for ids in tokenizer(list(examples.texts))["input_ids"]:
            assert tokenizer.unk_token_id not in ids, tokenizer.decode(ids)
            assert len(ids) <= 32, f"longer than max_seq_length: {tokenizer.decode(ids)}"


def test_tokenizer_is_unchanged_by_saving(splits, tmp_path):
    """AutoTokenizer must use the tokenizer's class, not the model type in `config.json`."""
    tokenizer = demo.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert"}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = list(splits["dev"].texts[:50])
    for arguments in ({"text": texts}, {"text": texts, "text_pair": texts[::-1]}):
        expected = tokenizer(**arguments, return_token_type_ids=True)
        assert dict(loaded(**arguments, return_token_type_ids=True)) == dict(expected)
    assert expected["token_type_ids"][0][0] == 0 and expected["token_type_ids"][0][-1] == 1
    first = tokenizer.decode(tokenizer(texts[0])["input_ids"], skip_special_tokens=True)
    assert first.replace(" ", "") == texts[0].lower().replace(" ", "")
