"""What a client does to its connection: sends too much, or goes away."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.exceptions import HTTPException

_CLIENT_CLOSED_REQUEST = 499
Result = TypeVar("Result")


class BodyLimit:
    """Refuses requests whose body is too large, also if they do not say how large it is.

    Args:
        limit: the most bytes of a body.
        refusal: returns the answer to such a request.
    """

    def __init__(self, app: Any, limit: int, refusal: Callable[[], Response]):
        self._app = app
        self._limit = limit
        self._refusal = refusal

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            await self._refusal()(scope, receive, send)
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
            await self._refusal()(scope, receive, send)


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
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
