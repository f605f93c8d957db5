"""The demo task: sentiment of short generated English reviews of graded difficulty.

Every review is positive or negative. The kinds of reviews differ in the steps that lead from the
wording to the label:

- plain: "The film was truly wonderful."
- negation: "On the whole, the film was hardly wonderful."
- reported speech: "My aunt said the film was truly wonderful, but that was wrong."
- disagreement: "My aunt called the film dull, my boss called it superb, and the latter was right."
- nested negation: "Nobody would say that it is a lie that the film was not dull."
- contrast: "Although the music was lovely, the film was not impressive." The label is that of the
  main clause, or of the clause after "but".

The generator draws the wording of a review independently of its label, and then the adjectives that
make the label true. Both labels are equally frequent in every kind of every split.
"""

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from pabee_jax.data.task import Examples, Task

LABEL_NAMES = ("negative", "positive")
SPLIT_SIZES = {"train": 10_000, "dev": 1_500, "test": 1_500}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_SEED = 20060415

# Topics, and the aspects that a review of the topic may mention. The words and their spelling are
# part of the released data (tests/test_data_demo.py).
_TOPICS = (
    ("film", ("plot", "acting", "music", "dialogue", "ending")),
    ("novel", ("plot", "prose", "opening", "dialogue", "ending")),
    ("play", ("acting", "staging", "opening", "dialogue", "ending")),
    ("concert", ("singer", "music", "sound", "band", "hall")),
    ("hotel", ("room", "view", "breakfast", "service", "bar")),
    ("restaurant", ("food", "wine", "service", "menu", "terrace")),
    ("museum", ("tour", "building", "garden", "shop", "collection")),
    ("holiday", ("weather", "beach", "food", "tour", "hotel")),
)
# In every pair of word lists, the first list makes a review negative or negates a statement.
_ADJECTIVES = (
    (
        *("dull", "dreadful", "terrible", "awful", "boring", "horrible", "poor", "disappointing"),
        *("tedious", "unpleasant", "mediocre", "forgettable", "dismal", "bad"),
    ),
    (
        *("wonderful", "lovely", "superb", "excellent", "delightful", "great", "impressive"),
        *("charming", "memorable", "fantastic", "brilliant", "splendid", "pleasant", "good"),
    ),
)
_COPULAS = (
    ("was not", "was never", "was hardly", "was anything but", "was far from", "was scarcely"),
    ("was", "was truly", "was really", "was simply", "was quite", "was just", "turned out"),
)
_BELIEFS = (
    ("I do not think", "I doubt", "nobody would say", "no critic agreed", "everyone denies"),
    ("I do think", "I know", "everybody would say", "each critic agreed", "nobody denies"),
)
_TRUTHS = (
    ("it is not true", "it is false", "it is a lie", "it is wrong to say"),
    ("it is quite true", "it is clear", "it is a fact", "it is right to say"),
)
_VERDICTS = (("wrong", "mistaken", "in error"), ("right", "correct", "spot on"))
_OPENERS = (
    *("", "", "", "on the whole, ", "in the end, ", "this time, ", "last week, ", "for once, "),
    *("as far as I could tell, ", "in my opinion, ", "if you ask me, ", "as we found out, "),
)
_CONCESSIONS = (
    *("although {aside}, {point}", "even though {aside}, {point}", "while {aside}, {point}"),
    *("{aside}, but {point}", "{aside}, yet {point}", "granted, {aside}, but {point}"),
    *("{point}, although {aside}", "{point}, even though {aside}", "{point}, while {aside}"),
    *("{point}, though {aside}", "{point}, even if {aside}", "{point}, granted that {aside}"),
)
_SPEAKERS = ("sister", "brother", "aunt", "uncle", "mother", "father", "neighbour", "boss")
_ORDINALS = (("the first", "the former"), ("the second", "the latter"))


class _Dice:
    """Random choices that are the same in all versions of Python.

    Only `Random.random` is used: it is the only method whose sequence Python guarantees.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def pick(self, items: Sequence):
        return items[int(self.random() * len(items))]

    def pick_two(self, items: Sequence) -> tuple:
        """Return two different items in random order."""
        first = int(self.random() * len(items))
        second = (first + 1 + int(self.random() * (len(items) - 1))) % len(items)
        return items[first], items[second]

    def chance(self, probability: float) -> bool:
        return self.random() < probability


def _subjects(dice: _Dice) -> tuple[str, str]:
    """Return two different subjects of the same review."""
    topic, aspects = dice.pick(_TOPICS)
    return dice.pick_two(tuple(f"the {noun}" for noun in (topic, *aspects)))


def _clause(dice: _Dice, subject: str, positive: bool, denied: bool) -> str:
    """Return a statement about the subject; a denied statement has the opposite adjective."""
    adjective = dice.pick(_ADJECTIVES[positive != denied])
    return f"{subject} {dice.pick(_COPULAS[not denied])} {adjective}"


def _plain(dice: _Dice, positive: bool) -> str:
    return dice.pick(_OPENERS) + _clause(dice, _subjects(dice)[0], positive, denied=False)


def _negation(dice: _Dice, positive: bool) -> str:
    return dice.pick(_OPENERS) + _clause(dice, _subjects(dice)[0], positive, denied=True)


def _reported_speech(dice: _Dice, positive: bool) -> str:
    speaker, right = dice.pick(_SPEAKERS), dice.chance(0.5)
    claim = _clause(dice, _subjects(dice)[0], positive == right, denied=False)
    link, verdict = dice.pick(("and", "but")), dice.pick(_VERDICTS[right])
    return f"my {speaker} said {claim}, {link} that was {verdict}"


def _disagreement(dice: _Dice, positive: bool) -> str:
    speakers, judged = dice.pick_two(_SPEAKERS), dice.pick((0, 1))
    # The judged speaker is right in 75% of the reviews. At 50%, only the combination of referent,
    # verdict and claims would predict the label, and with some seeds training never learns the
    # combination. Single words do not predict the label in either case.
    right = dice.chance(0.75)
    claims = [dice.pick(_ADJECTIVES[(i == judged) == (positive == right)]) for i in (0, 1)]
    return (
        f"my {speakers[0]} called {_subjects(dice)[0]} {claims[0]}, my {speakers[1]} called it "
        f"{claims[1]}, and {dice.pick(_ORDINALS[judged])} was {dice.pick(_VERDICTS[right])}"
    )


def _nested_negation(dice: _Dice, positive: bool) -> str:
    # Two and three negations are equally frequent; otherwise the adjective alone would predict the
    # label.
    three = (True, True, True)
    two = ((True, True, False), (True, False, True), (False, True, True))
    doubted, untrue, denied = three if dice.chance(0.5) else dice.pick(two)
    belief, truth = dice.pick(_BELIEFS[not doubted]), dice.pick(_TRUTHS[not untrue])
    stated = positive != (doubted != untrue)
    return f"{belief} that {truth} that {_clause(dice, _subjects(dice)[0], stated, denied)}"


def _contrast(dice: _Dice, positive: bool) -> str:
    subject, other = _subjects(dice)
    point = _clause(dice, subject, positive, denied=dice.chance(0.3))
    aside = _clause(dice, other, not positive, denied=dice.chance(0.3))
    return dice.pick(_CONCESSIONS).format(point=point, aside=aside)


_Writer = Callable[[_Dice, bool], str]
# The writer of every kind and the kind's share of a split, from the easiest kind to the hardest.
# There are more plain reviews than negated reviews because otherwise adjectives would not correlate
# with labels and training would start slowly.
_KINDS: Mapping[str, tuple[_Writer, float]] = {
    "plain": (_plain, 0.22),
    "negation": (_negation, 0.12),
    "reported speech": (_reported_speech, 0.12),
    "disagreement": (_disagreement, 0.16),
    "nested negation": (_nested_negation, 0.18),
    "contrast": (_contrast, 0.20),
}
KINDS = tuple(_KINDS)


@functools.cache
def _splits() -> dict[str, Examples]:
    """Return all splits; they are generated together so that no sentence occurs twice."""
    dice, seen = _Dice(_SEED), set()
    return {split: _write(dice, size, seen) for split, size in SPLIT_SIZES.items()}


def _write(dice: _Dice, size: int, seen: set[str]) -> Examples:
    """Return shuffled sentences that are not in `seen`, and add them to `seen`.

    Within a kind, the two labels alternate.
    """
    rows = []
    for kind, (writer, share) in _KINDS.items():
        for i in range(round(size * share)):
            label = i % len(LABEL_NAMES)
            while (sentence := writer(dice, bool(label))) in seen:
                pass
            seen.add(sentence)
            rows.append((dice.random(), f"{sentence[0].upper()}{sentence[1:]}.", label, kind))
    _, texts, labels, kinds = zip(*sorted(rows), strict=True)
    ids = tuple(str(i) for i in range(len(rows)))
    return Examples(texts, None, np.asarray(labels, np.int32), ids, kinds)


def task() -> Task:
    """Return the demo task: two classes, judged by accuracy, with the kind of every review."""
    return Task("demo", LABEL_NAMES, ("accuracy",), lambda split: {split: _splits()[split]})


def vocabulary() -> list[str]:
    """Return the special tokens, then all words and punctuation marks of the task, sorted."""
    texts = " ".join(text for examples in _splits().values() for text in examples.texts)
    return [*SPECIAL_TOKENS, *sorted(set(re.findall(r"\w+|[^\w\s]", texts.lower())))]


def tokenizer() -> BertTokenizerFast:
    """Return a lower-casing word-level tokenizer; token ids are positions in `vocabulary()`."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    return BertTokenizerFast(vocab=ids, do_lower_case=True)
