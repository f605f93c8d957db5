"""Lets TextAttack attack an `EarlyExitClassifier`, and tells whether the attack also slows it.

    wrapper = EarlyExitModelWrapper(EarlyExitClassifier.from_pretrained("runs/sst2"))
    attack = TextFoolerJin2019.build(wrapper)
    print(under_attack(wrapper, Attacker(attack, dataset).attack_dataset()))

The attacked model is the classifier with its criterion: what an early exit answers, the attacker
sees. (TextAttack: Morris et al., arXiv 2005.05909.)
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
except Exception as error:  # Its import pulls in many packages and data, which fail in many ways.
    raise InputError(
        f"TextAttack cannot be imported ({type(error).__name__}: {error}); "
        "pip install textattack, or see docs/laboratory.md"
    ) from error


class EarlyExitModelWrapper(ModelWrapper):
    """The victim of a TextAttack recipe: texts, or tuples of two texts, to class probabilities.

    Attributes:
        model: the classifier. Its `criterion` may be set between two attacks.

    Raises:
        InputError: a model of scores, for which TextAttack has no goal.
    """

    def __init__(self, classifier: EarlyExitClassifier):
        if classifier.pretrained.model.config.is_regression:
            raise InputError("TextAttack attacks classes, and this checkpoint predicts scores")
        self.model = classifier

    def __call__(
        self, text_input_list: list[Text], **kwargs: Any
    ) -> Float[np.ndarray, "rows classes"]:
        """What each text's exit thinks, (rows, classes) float64 probabilities."""
        del kwargs
        # In float64: TextAttack takes the softmax once more of what misses the sum 1 by 1e-6.
        return softmax(self.model.predict(text_input_list).logits.astype(np.float64), axis=1)


@dataclasses.dataclass(frozen=True)
class UnderAttack(Effect):
    """What an attack did.

    Attributes:
        rows: attacked texts, those included that were wrong from the start.
        queries: mean number of the attacker's questions to the model per row.
    """

    rows: int
    queries: float

    @property
    def slowdown(self) -> float:
        """Mean exit layer under attack over the one before; above 1 the attack also costs time."""
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
    """Accuracy and mean exit layer before and under an attack.

    Args:
        wrapper: what was attacked, with the same criterion.
        results: TextAttack's `AttackResult`s, as `Attacker.attack_dataset()` returns them.

    Raises:
        InputError: there are no results.
    """
    results = list(results)
    if not results:
        raise InputError("there are no attack results to sum up")
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
