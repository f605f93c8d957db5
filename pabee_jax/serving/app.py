"""The HTTP service around an engine: the contract of text-embeddings-inference."""

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from scipy.special import expit, softmax
from starlette.exceptions import HTTPException

from pabee_jax import __version__, criteria
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.tokenization import encode
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.engine import Answer, Engine, Overloaded
from pabee_jax.inference.inputs import Text, checked_texts
from pabee_jax.serving.metrics import Metrics
from pabee_jax.serving.schemas import (
    ClassifierModel,
    ErrorResponse,
    ErrorType,
    Exit,
    Explanation,
    InferenceRequest,
    Info,
    ModelType,
    Prediction,
    Predictions,
    PredictRequest,
)

_STATUS: dict[ErrorType, int] = {
    "Validation": 422,
    "Tokenizer": 422,
    "Unauthorized": 401,
    "Backend": 424,
    "Overloaded": 429,
    "Unhealthy": 503,
}
_TOO_LARGE = 413
_CLIENT_CLOSED_REQUEST = 499
Result = TypeVar("Result")


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
        self.status = status or _STATUS[error_type]
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
        self._explainer = EarlyExitClassifier(engine.classifier.pretrained, driver="full")

    async def warmup(self) -> None:
        """Compile the programs of every allowed criterion."""
        loop = asyncio.get_running_loop()
        for name in self._allowed_criteria:
            await loop.run_in_executor(None, self.engine.warmup, self._example_of(name))
        self.is_ready = True

    def _example_of(self, name: str) -> ExitCriterion | None:
        kind = criteria.criterion_class(name)
        if isinstance(self.engine.classifier.criterion, kind):
            return None
        config = self.engine.classifier.config
        logits = np.zeros((config.num_hidden_layers, 1, config.num_labels), np.float32)
        families = kind.families(logits, 2).values()
        return next(setting for settings in families for setting in settings)

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
                _TOO_LARGE,
            )
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(None, self._tokenized, texts, request.truncate)
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
        names = classifier.pretrained.label_names or ("LABEL_0",)
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
            max_batch_tokens=config.max_tokens,
            max_batch_requests=config.max_rows,
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
                criteria.check(criterion, self.engine.classifier.config.is_regression)
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
            tokens = encode(pretrained.tokenizer, *checked_texts(texts), _NO_LIMIT)
            longest, limit = int(tokens.lengths.max()), pretrained.max_length
            if longest <= limit:
                return tokens
            if not (self.limits.auto_truncate if truncate is None else truncate):
                raise ServiceError(
                    "Validation",
                    f"inputs has {longest} tokens, and at most {limit} are allowed: shorten it, or "
                    "give truncate=true",
                    _TOO_LARGE,
                )
            return self.engine.classifier.tokenize(texts)
        except InputError as error:
            raise ServiceError("Tokenizer", str(error)) from None

    def _predictions(self, logits: np.ndarray, raw_scores: bool) -> list[Prediction]:
        """Return the scores of all classes, the highest first."""
        names = self.engine.classifier.pretrained.label_names or ("LABEL_0",)
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
        logits = self._explainer.all_exit_logits(tokens)
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


# The tokens of a text are counted without truncation; a request has far fewer.
_NO_LIMIT = 1_000_000_000


def make_app(service: Service) -> FastAPI:
    """Return the ASGI application. It warms up in the background, and drains when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warmup = asyncio.create_task(service.warmup())
        yield
        warmup.cancel()
        await asyncio.get_running_loop().run_in_executor(None, service.engine.close)
        print(
            f"stopped: {service.answered} of {service.accepted} accepted requests were answered",
            flush=True,
        )

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (401, 413, 422, 424, 429, 503)
    }
    app = FastAPI(title="pabee_jax", version=__version__, lifespan=lifespan, responses=errors)
    _add_errors(app, service)

    async def check_key(request: Request) -> None:
        expected = f"Bearer {service.limits.api_key}".encode()
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if service.limits.api_key and not hmac.compare_digest(given, expected):
            raise ServiceError("Unauthorized", "the bearer key is missing or wrong")

    async def predict(body: PredictRequest, request: Request, response: Response) -> Predictions:
        if not service.is_ready:
            raise ServiceError("Unhealthy", "the service is compiling its programs")
        method = "batch" if body.is_batch else "single"
        service.metrics.requests.labels(method=method).inc()
        start = time.monotonic()
        service.accepted += 1
        try:
            result, headers = await _unless_disconnected(request, service.predict(body))
        except (ServiceError, Overloaded, HTTPException):
            service.answered += 1
            raise
        service.answered += 1
        service.metrics.duration.observe(time.monotonic() - start)
        service.metrics.successes.labels(method=method).inc()
        response.headers.update(headers)
        return result

    keyed = [Depends(check_key)]
    app.post("/predict", response_model=Predictions, dependencies=keyed)(predict)

    @app.post("/", response_model=list[list[Prediction]], dependencies=keyed)
    async def classify(
        body: InferenceRequest, request: Request, response: Response
    ) -> list[list[Prediction]]:
        """Answer `huggingface_hub.InferenceClient.text_classification`."""
        inner = PredictRequest(inputs=body.inputs, raw_scores=body.parameters.raw_scores)
        result: Any = await predict(inner, request, response)
        return [row[: body.parameters.top_k] for row in (result if inner.is_batch else [result])]

    @app.get("/", response_class=HTMLResponse)
    async def playground() -> HTMLResponse:
        return page()

    @app.get("/health", responses={200: {"description": "The service is ready"}})
    async def health() -> Response:
        if not service.is_ready:
            raise ServiceError("Unhealthy", "the service is compiling its programs")
        return Response()

    @app.get("/info", dependencies=keyed)
    async def info() -> Info:
        return service.info()

    @app.get("/metrics", dependencies=keyed, response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    """Give every error the same body, and refuse bodies that are too large before reading them."""

    def respond(error: ServiceError) -> JSONResponse:
        service.metrics.failures.labels(err=error.body.error_type).inc()
        return JSONResponse(error.body.model_dump(), error.status)

    @app.exception_handler(ServiceError)
    async def on_service_error(_: Request, error: ServiceError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(Overloaded)
    async def on_overloaded(_: Request, error: Overloaded) -> JSONResponse:
        return respond(ServiceError("Overloaded", str(error)))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return respond(ServiceError("Validation", f"{place}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> JSONResponse:
        # FastAPI answers a body that it cannot decode with status 400.
        status = _STATUS["Validation"] if error.status_code == 400 else error.status_code
        return respond(ServiceError("Validation", str(error.detail), status))

    @app.exception_handler(Exception)
    async def on_failure(_: Request, error: Exception) -> JSONResponse:
        return respond(ServiceError("Backend", f"{type(error).__name__}: {error}"))

    app.add_middleware(_BodyLimit, limit=service.limits.max_body_bytes)


class _BodyLimit:
    """Refuses requests whose body is too large, also if they do not say how large it is."""

    def __init__(self, app: Any, limit: int):
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            await self._refuse(scope, receive, send)
            return
        size = 0
        too_large = False

        async def limited() -> Any:
            nonlocal size, too_large
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                too_large = True
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        async def send_unless_refused(message: Any) -> None:
            if not too_large:
                await send(message)

        await self._app(scope, limited, send_unless_refused)
        if too_large:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        message = f"the request has more than {self._limit} bytes"
        body = ErrorResponse(error=message, error_type="Validation")
        await JSONResponse(body.model_dump(), _TOO_LARGE)(scope, receive, send)


async def _unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of `work`, which is cancelled when the client has gone."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            raise HTTPException(_CLIENT_CLOSED_REQUEST, "the client has gone")
        return task.result()
    finally:
        watcher.cancel()


async def _disconnection(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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


def page() -> HTMLResponse:
    """Return the playground."""
    text = importlib.resources.files("pabee_jax.serving").joinpath("page.html").read_text("utf-8")
    return HTMLResponse(text)
