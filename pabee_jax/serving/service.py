"""Answers requests with an engine: limits, tokenization, criteria, scores and explanations."""

import asyncio
import copy
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from pabee_jax import __version__, criteria
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.tokenization import encode
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.engine import Answer, Engine, EngineConfig
from pabee_jax.inference.inputs import Text, checked_texts
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
# The tokens of a text are counted without truncation; a request has far fewer.
_NO_LIMIT = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the service accepts.

    Attributes:
        max_client_batch_size: the most rows of a request.
        max_body_bytes: the most bytes of a request.
        auto_truncate: whether texts with too many tokens are truncated if a request does not say.
        api_key: requests must have this bearer key; empty: no key is needed.
    """

    max_client_batch_size: int = 32
    max_body_bytes: int = 2_000_000
    auto_truncate: bool = False
    api_key: str = ""


class ServiceError(Exception):
    """An error with the body that the client receives."""

    def __init__(self, error_type: ErrorType, message: str, status: int | None = None):
        super().__init__(message)
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
        # A tokenizer keeps the truncation of its last call, also for calls of other threads. So
        # the classifier's own tokenizer always truncates, and this copy never does.
        self._untruncated = copy.deepcopy(engine.classifier.pretrained.tokenizer)
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
        """Compile the programs of every allowed criterion; then the service is ready."""
        for setting in [self.engine.classifier.criterion, *self._examples()]:
            self.engine.warmup(setting)
        self.is_ready = True

    def _examples(self) -> Iterator[ExitCriterion]:
        """Yield a setting of every allowed criterion; a model of one layer has no patience."""
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
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(
            self.engine.tokenizers, self._tokenized, texts, request.truncate
        )
        tokenization = time.monotonic() - start
        self.metrics.tokenization.observe(tokenization)
        answers = await self.engine.answers(tokens, criterion)
        for answer in answers:
            self.metrics.observe(answer)
        scores = [self._predictions(answer.logits, request.raw_scores) for answer in answers]
        result: Any = scores
        if request.explain:
            result = await loop.run_in_executor(
                None, self._explained, tokens, answers, scores, request.raw_scores
            )
        headers = _headers(answers, tokenization, time.monotonic() - start)
        return result if request.is_batch else result[0], headers

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
                config = self.engine.classifier.config
                trained_exits = self.engine.classifier.pretrained.trained_exits
                criteria.check(
                    criterion, config.num_hidden_layers, config.num_labels, trained_exits
                )
        except InputError as error:
            raise ServiceError("Validation", str(error)) from None
        if criterion is not None and criteria.name_of(criterion) not in self._allowed_criteria:
            allowed = ", ".join(self._allowed_criteria)
            raise ServiceError(
                "Validation",
                f"criterion {criteria.name_of(criterion)} is not served; served are {allowed}",
            )
        return criterion

    def _tokenized(self, texts: Sequence[Text], truncate: bool | None) -> Dataset:
        """Return the tokens; a text that is too long is truncated or refused."""
        pretrained = self.engine.classifier.pretrained
        try:
            tokens = encode(self._untruncated, *checked_texts(texts), _NO_LIMIT)
            longest, limit = int(tokens.lengths.max()), pretrained.max_length
            if longest <= limit:
                return tokens
            if not (self.limits.auto_truncate if truncate is None else truncate):
                raise ServiceError(
                    "Validation",
                    f"inputs has {longest} tokens, and at most {limit} are allowed: shorten it, or "
                    "give truncate=true",
                    TOO_LARGE,
                )
            return self.engine.classifier.tokenize(texts)
        except InputError as error:
            raise ServiceError("Tokenizer", str(error)) from None

    def _predictions(self, logits: np.ndarray, raw_scores: bool) -> list[Prediction]:
        """Return the scores of all classes, the highest first."""
        names = self.engine.classifier.pretrained.output_names
        probabilities = expit if len(logits) == 1 else softmax
        scores = logits if raw_scores else probabilities(logits)
        order = np.argsort(-scores, kind="stable")
        return [Prediction(score=float(scores[index]), label=names[index]) for index in order]

    def _explained(
        self,
        tokens: Dataset,
        answers: Sequence[Answer],
        scores: Sequence[list[Prediction]],
        raw_scores: bool,
    ) -> list[Explanation]:
        logits = self.engine.classifier.all_exit_logits(tokens)
        return [
            Explanation(
                predictions=scores[row],
                exit_layer=answers[row].exit_layer,
                exits=[
                    Exit(
                        layer=layer,
                        logits=of_exit[row].tolist(),
                        predictions=self._predictions(of_exit[row], raw_scores),
                    )
                    for layer, of_exit in enumerate(logits, start=1)
                ],
            )
            for row in range(len(answers))
        ]


def _headers(answers: Sequence[Answer], tokenization: float, total: float) -> dict[str, str]:
    """Return the headers with the times in milliseconds, those of the slowest row."""
    seconds = {
        "x-total-time": total,
        "x-tokenization-time": tokenization,
        "x-queue-time": max(answer.queue_seconds for answer in answers),
        "x-inference-time": max(answer.inference_seconds for answer in answers),
    }
    headers = {name: f"{1000 * value:.3f}" for name, value in seconds.items()}
    layers = ",".join(str(answer.exit_layer) for answer in answers)
    return headers | {"x-exit-layers": layers}
