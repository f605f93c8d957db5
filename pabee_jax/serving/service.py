"""Answers requests with an engine: limits, tokenization, criteria, scores and explanations."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from pabee_jax import __version__, criteria
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data.tokenization import TooManyTokens
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.engine import Answer, Closed, Engine, EngineConfig, Overloaded
from pabee_jax.serving.metrics import Metrics
from pabee_jax.serving.schemas import (
    ClassifierModel,
    ErrorResponse,
    ErrorType,
    Exit,
    Explanation,
    Info,
    ModelType,
    Prediction,
    Predictions,
    PredictRequest,
)

STATUS: dict[ErrorType, int] = {
    "Validation": 422,
    "Tokenizer": 422,
    "Unauthorized": 401,
    "Backend": 424,
    "Overloaded": 429,
    "Unhealthy": 503,
}
TOO_LARGE = 413
# The headers of an answer; the times are in milliseconds.
HEADERS = (
    "x-exit-layers",
    "x-total-time",
    "x-tokenization-time",
    "x-queue-time",
    "x-inference-time",
)
# The first class that fits.
_ERROR_TYPES: dict[type[Exception], ErrorType] = {
    Overloaded: "Overloaded",
    Closed: "Unhealthy",
    InputError: "Tokenizer",
}
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the service accepts.

    Attributes:
        max_client_batch_size: the most rows of a request.
        max_body_bytes: the most bytes of a request.
        auto_truncate: whether texts with too many tokens are truncated if a request does not say.
        api_key: requests must have this bearer key; empty: no key is needed.
        cors_allow_origin: the origins whose pages may use the service from a browser, such as
            "https://example.com"; "*" for all.
    """

    max_client_batch_size: int = 32
    max_body_bytes: int = 2_000_000
    auto_truncate: bool = False
    api_key: str = ""
    cors_allow_origin: tuple[str, ...] = ()


class ServiceError(Exception):
    """An error with the body that the client receives."""

    def __init__(self, error_type: ErrorType, message: str, status: int | None = None):
        super().__init__(message)
        # A client's key may hold half a surrogate pair, which has no encoding in UTF-8.
        message = message.encode("utf-8", "backslashreplace").decode()
        self.status = status or STATUS[error_type]
        self.body = ErrorResponse(error=message, error_type=error_type)


class Service:
    """Answers requests with an engine.

    Attributes:
        engine: the engine.
        is_ready: whether the programs are compiled.
        accepted: the requests for predictions that were accepted.
        answered: those that were answered or refused with a reason.
    """

    def __init__(
        self, engine: Engine, model_id: str, limits: Limits, allowed_criteria: Sequence[str]
    ):
        self.engine = engine
        self.limits = limits
        self.is_ready = False
        self.accepted = self.answered = 0
        self.metrics = Metrics(engine)
        self._model_id = model_id
        own = criteria.name_of(engine.classifier.criterion)
        self._allowed_criteria = list(dict.fromkeys([own, *allowed_criteria]))

    @classmethod
    def open(
        cls,
        checkpoint: str,
        *,
        limits: Limits | None = None,
        config: EngineConfig | None = None,
        allowed_criteria: Sequence[str] = (),
        **options: Any,
    ) -> "Service":
        """Load a checkpoint and start its engine.

        Args:
            checkpoint: a checkpoint directory (local or on a cloud) or a Hugging Face hub id.
            limits: what the service accepts.
            config: the sizes of the engine.
            allowed_criteria: the criteria that requests may give; absent, patience and, for
                classes, max_probability.
            options: further arguments of `EarlyExitClassifier.from_pretrained`, such as
                `criterion`.

        Raises:
            InputError: a criterion that does not exist or does not fit the model, a checkpoint
                without tokenizer, or as `EarlyExitClassifier.from_pretrained`.
        """
        classifier = EarlyExitClassifier.from_pretrained(checkpoint, **options)
        classifier.pretrained.require_tokenizer()
        is_regression = classifier.config.is_regression
        default = ("patience",) if is_regression else ("patience", "max_probability")
        allowed = allowed_criteria or default
        for name in allowed:
            criteria.check_task(criteria.criterion_class(name), is_regression)
        return cls(Engine(classifier, config), str(checkpoint), limits or Limits(), allowed)

    def warmup(self) -> None:
        """Compile the programs of every criterion and of explanations, then be ready."""
        self.engine.warmup(all_exits=True)
        for setting in self._examples():
            self.engine.warmup(setting)
        self.is_ready = True

    def _examples(self) -> Iterator[ExitCriterion]:
        """Yield a setting of every allowed criterion; a model of one layer has no patience.

        Requests cannot give a criterion if only the last exit was trained.
        """
        if self.engine.classifier.pretrained.trained_exits == "last":
            return
        config = self.engine.classifier.config
        logits = np.zeros((config.num_hidden_layers, 1, config.num_labels), np.float32)
        for name in self._allowed_criteria:
            families = criteria.criterion_class(name).families(logits, 2).values()
            yield from itertools.islice(itertools.chain(*families), 1)

    async def predict(self, request: PredictRequest) -> tuple[Predictions, dict[str, str]]:
        """Return the answer, and the headers with its times in milliseconds."""
        start = time.monotonic()
        criterion = self._criterion_of(request)
        texts = request.texts
        if len(texts) > self.limits.max_client_batch_size:
            raise ServiceError(
                "Validation",
                f"the batch has {len(texts)} inputs, and at most "
                f"{self.limits.max_client_batch_size} are allowed",
                TOO_LARGE,
            )
        side = request.truncation_direction
        try:
            answers = await self.engine.predict(
                texts,
                criterion,
                truncate=self.limits.auto_truncate
                if request.truncate is None
                else request.truncate,
                truncation_side=None if side is None else side.lower(),
                all_exits=request.explain,
            )
        except Exception as error:
            raise _service_error(error) from error
        for answer in answers:
            self.metrics.observe(answer)
        self.metrics.tokenization.observe(answers[0].tokenization_seconds)
        of_row = self._explanation if request.explain else self._predictions
        rows: Any = [of_row(answer, request.raw_scores) for answer in answers]
        return rows if request.is_batch else rows[0], _headers(answers, time.monotonic() - start)

    def info(self) -> Info:
        classifier, config = self.engine.classifier, self.engine.config
        names = classifier.pretrained.output_names
        return Info(
            model_id=self._model_id,
            model_dtype=str(classifier.model.dtype),
            model_type=ModelType(
                classifier=ClassifierModel(
                    id2label={str(index): name for index, name in enumerate(names)},
                    label2id={name: index for index, name in enumerate(names)},
                )
            ),
            max_concurrent_requests=config.max_waiting,
            max_input_length=classifier.pretrained.max_length,
            max_batch_tokens=self.engine.max_tokens,
            max_batch_requests=self.engine.max_rows,
            max_client_batch_size=self.limits.max_client_batch_size,
            auto_truncate=self.limits.auto_truncate,
            tokenization_workers=config.tokenizer_threads,
            version=__version__,
            num_layers=classifier.num_layers,
            criterion=criteria.to_config(classifier.criterion),
            criteria=self._allowed_criteria,
        )

    def _criterion_of(self, request: PredictRequest) -> ExitCriterion | None:
        try:
            criterion = request.exit_criterion
            if criterion is not None:
                self.engine.classifier.pretrained.check_criterion(criterion)
        except InputError as error:
            raise ServiceError("Validation", str(error)) from None
        if criterion is not None and criteria.name_of(criterion) not in self._allowed_criteria:
            allowed = ", ".join(self._allowed_criteria)
            raise ServiceError(
                "Validation",
                f"criterion {criteria.name_of(criterion)} is not served; served are {allowed}",
            )
        return criterion

    def _predictions(self, answer: Answer, raw_scores: bool) -> list[Prediction]:
        """Return the scores of all classes, the highest first."""
        return self._scores(answer.logits, raw_scores)

    def _explanation(self, answer: Answer, raw_scores: bool) -> Explanation:
        """Return the scores of all classes at every exit."""
        assert answer.exit_logits is not None
        return Explanation(
            predictions=self._predictions(answer, raw_scores),
            exit_layer=answer.exit_layer,
            exits=[
                Exit(
                    layer=layer,
                    logits=logits.tolist(),
                    predictions=self._scores(logits, raw_scores),
                )
                for layer, logits in enumerate(answer.exit_logits, start=1)
            ],
        )

    def _scores(self, logits: np.ndarray, raw_scores: bool) -> list[Prediction]:
        if not np.isfinite(logits).all():
            raise ServiceError("Backend", "the model gives scores that are not finite numbers")
        names = self.engine.classifier.pretrained.output_names
        probabilities = expit if len(logits) == 1 else softmax
        scores = logits if raw_scores else probabilities(logits)
        order = np.argsort(-scores, kind="stable")
        return [Prediction(score=float(scores[index]), label=names[index]) for index in order]


def _service_error(error: Exception) -> ServiceError:
    """Return what the client receives for an error of the engine."""
    if isinstance(error, TooManyTokens):
        return ServiceError("Validation", f"{error}, with truncate=true", TOO_LARGE)
    for kind, error_type in _ERROR_TYPES.items():
        if isinstance(error, kind):
            return ServiceError(error_type, str(error))
    _log.error("a request failed", exc_info=error)
    return ServiceError("Backend", f"{type(error).__name__}: {error}")


def _headers(answers: Sequence[Answer], total: float) -> dict[str, str]:
    """Return the headers of an answer; the times are those of the slowest row."""
    seconds = (
        total,
        answers[0].tokenization_seconds,
        max(answer.queue_seconds for answer in answers),
        max(answer.inference_seconds for answer in answers),
    )
    layers = ",".join(str(answer.exit_layer) for answer in answers)
    return dict(zip(HEADERS, (layers, *(f"{1000 * value:.3f}" for value in seconds)), strict=True))
