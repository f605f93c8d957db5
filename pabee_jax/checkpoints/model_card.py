"""The model card of a checkpoint: README.md, as the Hugging Face hub shows it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from etils import epath

from pabee_jax.criteria import ExitCriterion, describe

_CRITERION = "- Exit criterion: "
# A README.md with this line may be replaced.
_MARK = "<!-- Written by pabee_jax. -->"


@dataclasses.dataclass(frozen=True)
class TrainingFacts:
    """What a training run states in its card.

    Attributes:
        task: the name of the task.
        encoder: the encoder, as given in the configuration; empty for random parameters.
        settings: the settings that were given, one per line.
        quality: what the run printed about quality on dev.
    """

    task: str
    encoder: str
    settings: str
    quality: str

    @property
    def base_model(self) -> str | None:
        """The encoder's name; a path or an address says nothing to other people."""
        is_hub_id = "://" not in self.encoder and not Path(self.encoder).exists()
        return (self.encoder if is_hub_id else Path(self.encoder).name) or None

    @property
    def license(self) -> str | None:
        """The licence that the card in the encoder's directory states, or None."""
        return license_of(Path(self.encoder) / "README.md") if self.encoder else None

    @property
    def text(self) -> str:
        """The section on training."""
        base = self.base_model or "parameters drawn at random"
        return (
            f"Task {self.task}, from {base}, with these settings:\n\n"
            f"```\n{self.settings}\n```\n\n```\n{self.quality.strip()}\n```\n"
        )


def model_card(pretrained: Any, training: TrainingFacts | None = None) -> str:
    """Return the card of a checkpoint: metadata, use, exits, training and limits.

    Args:
        pretrained: a `Pretrained`.
        training: what is known of the training; None if nothing is.
    """
    from huggingface_hub import ModelCardData  # Imported here: prediction needs no card.

    config = pretrained.model.config
    data = ModelCardData(
        base_model=training.base_model if training else None,
        license=training.license if training else None,
        library_name="pabee_jax",
        pipeline_tag="text-classification",
        tags=["early-exit", "pabee", "jax"],
    )
    names = ", ".join(pretrained.output_names)
    if not pretrained.label_names:
        names = f"one score, {names} (regression)"
    sections = [
        f"---\n{data.to_yaml()}\n---\n{_MARK}\n",
        "# A classifier with early exits\n",
        f"This {config.family} encoder has {config.num_hidden_layers} layers, each with an "
        "internal classifier (exit). Inference stops for a text as soon as its exits satisfy a "
        "criterion: "
        "[Patience-based Early Exit](https://arxiv.org/abs/2006.04152).\n",
        f"- Labels: {names}\n{_criterion_line(pretrained.criterion)}\n"
        f"- Texts are truncated to {pretrained.max_length} tokens\n",
        "## Use\n",
        "```python\nfrom pabee_jax import EarlyExitClassifier\n\n"
        'classifier = EarlyExitClassifier.from_pretrained("THIS_REPOSITORY")\n'
        'predictions = classifier.predict(["a text", "another text"])\n'
        "print(predictions.labels, predictions.exit_layers)\n```\n",
    ]
    if training:
        sections += ["## Training\n", training.text]
    sections += [
        "## Limits\n",
        "Quality and speed depend on the exit criterion, and were measured, if at all, on the rows "
        "that this card names. The limits of the base model and of its training data apply, and so "
        "does its licence.\n",
    ]
    return "\n".join(sections)


def with_criterion(card: str, criterion: ExitCriterion) -> str:
    """Return the text of a card with another exit criterion; the other lines stay."""
    line = _criterion_line(criterion)
    return re.sub(rf"^{_CRITERION}.*$", lambda _: line, card, count=1, flags=re.MULTILINE)


def _criterion_line(criterion: ExitCriterion | None) -> str:
    return _CRITERION + (describe(criterion) if criterion else "none (full depth)")


def license_of(path: Path) -> str | None:
    """Return the licence in the metadata of a card; None if there is no card or no licence."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(path).data.to_dict().get("license") if path.is_file() else None
    except Exception:  # A card that cannot be read states no licence.
        return None


def may_write(path: Path | epath.Path) -> bool:
    """Return whether a README.md is absent, or a card of this module."""
    try:
        return _MARK in path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
