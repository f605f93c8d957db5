"""The demo task: short English reviews, made here, whose verdict needs more or less work to find.

Every sentence is positive or negative. Its kind says what has to be undone to see which:

- plain: "The film was truly wonderful."
- negation: "On the whole, the film was hardly wonderful."
- contrast: "Although the music was lovely, the film was not impressive." The main clause decides,
  or what follows "but".
- nested negation: "Nobody would deny that I do not think that the film was dull."
- reported speech: "My aunt called the film dull, my boss called it superb, and my aunt was wrong."

Within a kind the wording is drawn first and independently of the label, and only then the
adjectives that make the label true; both labels are equally frequent in every kind of every split.
"""

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from transformers import BertTokenizerFast

from pabee_jax.data.task import Examples, Task

LABEL_NAMES = ("negative", "positive")
import os
W=eval(os.environ.get("W","(24,14,14,14,14,20)"))
SPLIT_SIZES = {"train": 100, "dev": 15, "test": 15}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_SEED = 20060415

# A thing that can be reviewed, and what a review of it can talk about.
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
_ADJECTIVES = (
    (
        *("dull", "dreadful", "terrible", "awful", "boring", "horrible", "poor", "disappointing"),
        *("tedious", "unpleasant", "mediocre", "forgettable", "dismal", "lousy", "bad"),
    ),
    (
        *("wonderful", "lovely", "superb", "excellent", "delightful", "great", "impressive"),
        *("charming", "memorable", "fantastic", "brilliant", "splendid", "pleasant", "good", "fine"),
    ),
)
_OPENERS = (
    *("", "", "", "on the whole, ", "in the end, ", "this time, ", "last week, ", "for once, "),
    *("as far as I could tell, ", "in my opinion, ", "if you ask me, ", "as we found out, "),
)
_ASSERTIONS = ("was", "was truly", "was really", "was simply", "was quite", "was just", "turned out")
_DENIALS = ("was not", "was never", "was hardly", "was anything but", "was far from", "was scarcely")
_CONCESSIONS = (
    *("although {aside}, {point}", "even though {aside}, {point}", "while {aside}, {point}"),
    *("{aside}, but {point}", "{aside}, yet {point}", "granted, {aside}, but {point}"),
    *("{point}, although {aside}", "{point}, even though {aside}", "{point}, while {aside}"),
    *("{point}, though {aside}", "{point}, even if {aside}", "{point}, however much {aside}"),
)
# Beliefs and verdicts by sign: whether they turn the statement inside them round (0) or not (1).
_BELIEFS = (
    ("I do not think", "I doubt", "nobody would say", "no critic agreed", "everyone denies"),
    ("I do think", "I know", "everybody would say", "each critic agreed", "nobody denies"),
)
_TRUTHS = (
    ("it is not true", "it is false", "it is a lie", "it is wrong to say"),
    ("it is quite true", "it is clear", "it is a fact", "it is right to say"),
)
_VERDICTS = (("wrong", "mistaken", "in error"), ("right", "correct", "spot on"))
_SPEAKERS = ("sister", "brother", "aunt", "uncle", "cousin", "boss", "friend", "teacher", "doctor")


class _Dice(random.Random):
    """Choices built on `random()` alone, the one method whose sequence Python guarantees."""

    def pick(self, items: Sequence):
        return items[int(self.random() * len(items))]

    def two(self, items: Sequence) -> tuple:
        """Two different items, in random order."""
        first = int(self.random() * len(items))
        second = (first + 1 + int(self.random() * (len(items) - 1))) % len(items)
        return items[first], items[second]

    def chance(self, probability: float) -> bool:
        return self.random() < probability


def _subjects(dice: _Dice) -> tuple[str, str]:
    """Two different things that one review can talk about."""
    topic, aspects = dice.pick(_TOPICS)
    return dice.two(("the " + topic, *("the " + aspect for aspect in aspects)))


def _clause(dice: _Dice, subject: str, positive: bool, denied: bool) -> str:
    """A statement about the subject that is positive or negative once a denial is undone."""
    verb = dice.pick(_DENIALS if denied else _ASSERTIONS)
    return f"{subject} {verb} {dice.pick(_ADJECTIVES[positive != denied])}"


def _plain(dice: _Dice, positive: bool) -> str:
    subject, _ = _subjects(dice)
    return dice.pick(_OPENERS) + _clause(dice, subject, positive, denied=False)


def _negation(dice: _Dice, positive: bool) -> str:
    subject, _ = _subjects(dice)
    return dice.pick(_OPENERS) + _clause(dice, subject, positive, denied=True)


def _contrast(dice: _Dice, positive: bool) -> str:
    frame = dice.pick(_CONCESSIONS)
    subject, other = _subjects(dice)
    point = _clause(dice, subject, positive, denied=dice.chance(0.3))
    aside = _clause(dice, other, not positive, denied=dice.chance(0.3))
    return frame.format(point=point, aside=aside)


def _nested_negation(dice: _Dice, positive: bool) -> str:
    # Two or three turns, equally often: the adjective alone must not give the label away.
    turns = (0, 0, 0) if dice.chance(0.5) else dice.pick(((0, 0, 1), (0, 1, 0), (1, 0, 0)))
    belief, truth = dice.pick(_BELIEFS[turns[0]]), dice.pick(_TRUTHS[turns[1]])
    stated = positive == (turns[0] == turns[1])
    subject, _ = _subjects(dice)
    return f"{belief} that {truth} that " + _clause(dice, subject, stated, denied=not turns[2])


def _reported_speech(dice: _Dice, positive: bool) -> str:
    speaker = dice.pick(_SPEAKERS)
    right = dice.chance(0.5)
    subject, _ = _subjects(dice)
    claim, verdict = dice.pick(_ADJECTIVES[positive == right]), dice.pick(_VERDICTS[right])
    return f"my {speaker} called {subject} {claim}, and my {speaker} was {verdict}"


def _disagreement(dice: _Dice, positive: bool) -> str:
    speakers = dice.two(_SPEAKERS)
    judged = dice.pick((0, 1))
    right = dice.chance(0.5)
    subject, _ = _subjects(dice)
    claims = [dice.pick(_ADJECTIVES[(who == judged) == (positive == right)]) for who in (0, 1)]
    return (
        f"my {speakers[0]} called {subject} {claims[0]}, my {speakers[1]} called it {claims[1]}, "
        f"and my {speakers[judged]} was {dice.pick(_VERDICTS[right])}"
    )


# From the kind that takes the least work to the one that takes the most.
KINDS: Mapping[str, Callable[[_Dice, bool], str]] = {
    "plain": _plain,
    "negation": _negation,
    "contrast": _contrast,
    "nested negation": _nested_negation,
    "reported speech": _reported_speech,
    "disagreement": _disagreement,
}


def _sentences(kind: str) -> dict[str, list[tuple[str, int]]]:
    """The kind's sentences and labels by split: distinct, and both labels equally frequent."""
    dice = _Dice(_SEED + list(KINDS).index(kind))
    seen: set[str] = set()
    splits: dict[str, list[tuple[str, int]]] = {}
    for split, size in SPLIT_SIZES.items():
        rows = splits[split] = []
        while len(rows) < size * W[list(KINDS).index(kind)]:
            label = len(rows) % len(LABEL_NAMES)
            sentence = KINDS[kind](dice, bool(label))
            if sentence not in seen:
                seen.add(sentence)
                rows.append((sentence[0].upper() + sentence[1:] + ".", label))
    return splits


@functools.cache
def _splits() -> dict[str, Examples]:
    kinds = {kind: _sentences(kind) for kind in KINDS}
    return {split: _examples(split, {k: rows[split] for k, rows in kinds.items()}) for split in SPLIT_SIZES}


def _examples(split: str, by_kind) -> Examples:
    rows = [(text, label, kind) for kind, rs in by_kind.items() for text, label in rs]
    texts, labels, kinds = zip(*rows, strict=True)
    return Examples(texts, None, np.asarray(labels, np.int32), tuple(map(str, range(len(texts)))), kinds)


def _read(split: str) -> dict[str, Examples]:
    return {split: _splits()[split]}


def task() -> Task:
    return Task("demo", LABEL_NAMES, ("accuracy",), _read)


def vocabulary() -> list[str]:
    """Special tokens, then every word and punctuation mark of the task in alphabetical order."""
    texts = (text.lower() for examples in _splits().values() for text in examples.texts)
    return [*SPECIAL_TOKENS, *sorted({w for text in texts for w in re.findall(r"\w+|[^\w\s]", text)})]


def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary())}, do_lower_case=True)
