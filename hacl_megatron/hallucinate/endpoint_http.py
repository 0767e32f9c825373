"""HTTP to an endpoint that is not trusted to end: each request has its time and its size, from the first byte to the
last.

The `openai` client's own time-out is between two bytes, and it takes a body whole, however large, and unpacks it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any

MOST_BYTES = 8 << 20
"""Of a reply's body; the longest answers take some kilobytes."""
_MOST_REDIRECTS = 5


def bounded_client(openai: Any, *, timeout: float, before: Callable[[], Awaitable[None]]) -> Any:
    """An HTTP client for `openai.AsyncOpenAI(http_client=...)`.

    Args:
        openai: the package; its own HTTP library (httpx in 2.x, httpx2 in 3.x) is used.
        timeout: seconds for a request as a whole, behind `before`; one that takes longer counts as a time-out, which
            the `openai` client tries again.
        before: awaited before each request, those that the `openai` client repeats included.
    """
    library = import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])

    class BoundedClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            await before()
            try:
                return await asyncio.wait_for(self._whole(request, options), timeout)
            except asyncio.TimeoutError:
                raise library.ReadTimeout(f"no whole reply within {timeout:g} s", request=request) from None

        async def _whole(self, request: Any, options: dict[str, Any]) -> Any:
            """The reply with its body read."""
            for _ in range(_MOST_REDIRECTS + 1):
                request.headers["Accept-Encoding"] = "identity"
                response = await super().send(request, stream=True, **{**options, "follow_redirects": False})
                try:
                    body = await self._body(request, response)
                finally:
                    await response.aclose()
                if response.next_request is None:
                    break
                request = response.next_request
            headers = [(k, v) for k, v in response.headers.multi_items() if k.lower() not in _OF_THE_WAY]
            return library.Response(response.status_code, headers=headers, content=body, request=request)

        async def _body(self, request: Any, response: Any) -> bytes:
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise openai.APIConnectionError(
                    message="the reply is compressed, which was not asked for", request=request
                )
            pieces, size = [], 0
            async for piece in response.aiter_raw():
                pieces.append(piece)
                size += len(piece)
                if size > MOST_BYTES:
                    raise openai.APIConnectionError(
                        message=f"the reply is larger than {MOST_BYTES >> 20} MiB", request=request
                    )
            return b"".join(pieces)

    return BoundedClient(timeout=timeout)


_OF_THE_WAY = ("transfer-encoding", "content-length", "content-encoding")
"""Headers that say how the body came, not what it is."""
