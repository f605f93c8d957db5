"""A TextAttack wrapper of `EarlyExitClassifier`, and the slowdown that an attack causes.

    wrapper = EarlyExitModelWrapper(EarlyExitClassifier.from_pretrained("runs/sst2"))
    attack = TextFoolerJin2019.build(wrapper)
    print(under_attack(wrapper, Attacker(attack, dataset).attack_dataset()))

The attacked model is the classifier with its criterion: the attacker receives the probabilities of
each text's early exit. TextAttack: Morris et al., arXiv 2005.05909.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from pabee_jax.analysis.robustness import Effect
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.inputs import Text

try:
    from textattack.models.wrappers import ModelWrapper  # pyright: ignore[reportMissingImports]
except Exception as error:  # It imports many packages and data sets, with any kind of error.
    raise InputError(
        f"TextAttack cannot be imported ({type(error).__name__}: {error}); "
        "pip install textattack, or see docs/laboratory.md"
    ) from error


class EarlyExitModelWrapper(ModelWrapper):
    """The model that a TextAttack recipe attacks: maps texts or pairs of texts to probabilities.

    Attributes:
        model: the classifier. Its `criterion` may be changed between attacks.

    Raises:
        InputError: a regression model, for which TextAttack has no attack goal.
    """

    def __init__(self, classifier: EarlyExitClassifier):
        if classifier.pretrained.model.config.is_regression:
            raise InputError(
                "TextAttack needs a classification model, but this checkpoint predicts scores"
            )
        self.model = classifier

    def __call__(
        self, text_input_list: list[Text], **kwargs: Any
    ) -> Float[np.ndarray, "rows classes"]:
        """Return the probabilities of each text's exit, (rows, classes) float64."""
        del kwargs
        # In float64, because TextAttack applies a second softmax to rows whose sum differs from 1
        # by more than 1e-6.
        return softmax(self.model.predict(text_input_list).logits.astype(np.float64), axis=1)


@dataclasses.dataclass(frozen=True)
class UnderAttack(Effect):
    """The effect of an attack on accuracy and on exit layers.

    Attributes:
        rows: number of attacked texts, including texts that were misclassified before the attack.
        queries: mean number of the attacker's model queries per row.
    """

    rows: int
    queries: float

    @property
    def slowdown(self) -> float:
        """Mean exit layer after the attack over before; above 1, the attack slows inference."""
        return self.mean_exit_layer_perturbed / self.mean_exit_layer_original

    def __str__(self) -> str:
        return (
            f"{self.rows} texts: accuracy {100 * self.accuracy_original:.2f} -> "
            f"{100 * self.accuracy_perturbed:.2f} (misled {100 * self.misled:.2f}%), "
            f"mean exit layer {self.mean_exit_layer_original:.2f} -> "
            f"{self.mean_exit_layer_perturbed:.2f} ({self.slowdown:.2f}x), "
            f"{self.queries:.1f} queries per text"
        )


def under_attack(wrapper: EarlyExitModelWrapper, results: Iterable[Any]) -> UnderAttack:
    """Return accuracy and mean exit layer before and after an attack.

    Args:
        wrapper: the attacked model, with the same criterion as during the attack.
        results: TextAttack's `AttackResult`s, as `Attacker.attack_dataset()` returns them.

    Raises:
        InputError: `results` is empty.
    """
    results = list(results)
    if not results:
        raise InputError("there are no attack results: attack at least one text")
    labels = np.array([result.original_result.ground_truth_output for result in results])
    texts = (
        [getattr(result, which).attacked_text.tokenizer_input for result in results]
        for which in ("original_result", "perturbed_result")
    )
    before, after = map(wrapper.model.predict, texts)
    effect = Effect.of(
        labels, before.labels, after.labels, before.exit_layers.mean(), after.exit_layers.mean()
    )
    queries = float(np.mean([result.num_queries for result in results]))
    return UnderAttack(**vars(effect), rows=len(results), queries=queries)
