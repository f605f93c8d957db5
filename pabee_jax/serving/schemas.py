"""The requests and answers of the service: those of text-embeddings-inference, and its own fields.

https://huggingface.github.io/text-embeddings-inference, /predict, /info.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt
from pydantic_core import PydanticCustomError

from pabee_jax import criteria
from pabee_jax.criteria import ExitCriterion, Patience
from pabee_jax.errors import InputError, shown
from pabee_jax.inference.inputs import Text

Sequence = Annotated[list[str], Field(min_length=1, max_length=2)]
ErrorType = Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Unauthorized"]
_SHAPES = (
    "it must be a text, a pair as a list of two texts, or a batch as a list of lists of one or two "
    "texts"
)


def _checked_inputs(inputs: Any) -> Any:
    """Raise an error that names the mistake, unless the value is a text, a pair or a batch."""
    problem = _problem_of(inputs)
    if problem is not None:
        # The message is a template: braces in the client's texts must not be fields.
        raise PydanticCustomError("inputs", "{problem}", {"problem": problem})
    return inputs


def _problem_of(inputs: Any) -> str | None:
    if isinstance(inputs, str):
        return None
    if not isinstance(inputs, list):
        return f"it is {shown(inputs)}; {_SHAPES}"
    if not inputs:
        return f"the list is empty; {_SHAPES}"
    if all(isinstance(item, str) for item in inputs):
        if len(inputs) <= 2:
            return None
        return (
            f"it is one list of {len(inputs)} texts, but one list is a text or a pair; for a "
            'batch, give every text a list of its own: [["a text"], ["another text"]]'
        )
    if any(isinstance(item, str) for item in inputs):
        return f"the list has both texts and other values; {_SHAPES}"
    for index, item in enumerate(inputs):
        if not isinstance(item, list) or not all(isinstance(text, str) for text in item):
            return f"item {index} is {shown(item)}; {_SHAPES}"
        if not 1 <= len(item) <= 2:
            return f"item {index} of the batch has {len(item)} texts, but it must have one or two"
    return None


def _capitalized(value: Any) -> Any:
    return value.capitalize() if isinstance(value, str) else value


class TextRequest(BaseModel):
    """The common fields of requests. Other fields, such as `model`, have no effect, as in TEI."""

    inputs: Annotated[
        str | Sequence | Annotated[list[Sequence], Field(min_length=1)],
        BeforeValidator(_checked_inputs),
        Field(
            description="A text; a pair of texts, as a list of two; or a batch, as a list of lists "
            "of one or two texts.",
            examples=["What is Deep Learning?"],
        ),
    ]
    truncate: StrictBool | None = Field(
        default=None,
        description="Truncate texts that have more tokens than the model takes. false: refuse "
        "them. null: as the service is set up.",
    )
    truncation_direction: Annotated[
        Literal["Left", "Right"] | None, BeforeValidator(_capitalized)
    ] = Field(
        default=None,
        description="The end of a text that truncation cuts. null: as the tokenizer is set up, "
        "usually Right.",
    )
    raw_scores: StrictBool = Field(
        default=False, description="Answer with logits instead of probabilities."
    )
    patience: StrictInt | None = Field(
        default=None,
        ge=0,
        description="Exit once this many classifiers in a row agree; 0: never exit early.",
    )
    criterion: dict[str, Any] | None = Field(
        default=None,
        description="An exit criterion with its fields.",
        examples=[{"criterion": "max_probability", "threshold": 0.9}],
    )

    @property
    def is_batch(self) -> bool:
        return isinstance(self.inputs, list) and isinstance(self.inputs[0], list)

    @property
    def texts(self) -> list[Text]:
        """The texts and pairs of the request."""
        if isinstance(self.inputs, str):
            return [self.inputs]
        sequences: list[Any] = self.inputs if self.is_batch else [self.inputs]
        return [parts[0] if len(parts) == 1 else (parts[0], parts[1]) for parts in sequences]

    @property
    def exit_criterion(self) -> ExitCriterion | None:
        """The criterion of the request; None for that of the service.

        Raises:
            InputError: the criterion is unknown, has a wrong field, or is given twice.
        """
        if self.patience is not None and self.criterion is not None:
            raise InputError("patience and criterion are two exit criteria; give one of them")
        if self.patience is not None:
            return Patience(self.patience)
        return None if self.criterion is None else criteria.from_config(self.criterion)


class PredictRequest(TextRequest):
    """The body of `POST /predict`."""

    explain: StrictBool = Field(
        default=False, description="Also answer with the prediction of every exit."
    )


class InferenceParameters(BaseModel):
    """The parameters of Hugging Face's text classification."""

    top_k: StrictInt | None = Field(
        default=None, ge=1, description="The number of classes in the answer."
    )
    function_to_apply: Literal["softmax", "none"] | None = None


class InferenceRequest(TextRequest):
    """The body of `POST /`, as Hugging Face's inference clients send it."""

    parameters: InferenceParameters | None = None


class Prediction(BaseModel):
    """The score of one class."""

    score: float
    label: str


class Exit(BaseModel):
    """What an exit predicts."""

    layer: int
    logits: list[float]
    predictions: list[Prediction]


class Explanation(BaseModel):
    """The answer for one text with `explain`."""

    predictions: list[Prediction]
    exit_layer: int
    exits: list[Exit]


Predictions = list[Prediction] | list[list[Prediction]] | Explanation | list[Explanation]


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: str
    error_type: ErrorType


class ClassifierModel(BaseModel):
    """The classes of the model."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(BaseModel):
    """What the model does."""

    classifier: ClassifierModel


class Info(BaseModel):
    """The answer of `GET /info`."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str | None = None
    model_dtype: str
    model_type: ModelType
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None = None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None = None
    docker_label: str | None = None
    num_layers: int
    criterion: dict[str, Any]
    criteria: list[str]
