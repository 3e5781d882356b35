"""Sends requests to an endpoint: so many at a time, each tried again where that may help, all within bounds.

It works in a thread of its own, so that answers come in while the worker scores. What a server answers is hostile until
it was read: redirects are not followed (the key would go with them), bodies are bounded before they are decoded.
"""

from __future__ import annotations

import asyncio
import atexit
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from email.utils import mktime_tz, parsedate_tz
from functools import cache
from typing import Any, NamedTuple

from capfilt.data.sample import is_text
from capfilt.errors import RecipeError, RunError
from capfilt.inference.captioners.endpoint.config import NO_KEY, RequestConfig
from capfilt.printable import printable
from capfilt.redact import HIDDEN
from capfilt.storage import documents

MAX_BODY = 256 * 2**10
"""Bytes of an answer; one of 1,000 tokens has about 5,000."""
MAX_LIST = 8 * 2**20
"""Bytes of what else a server says of itself, as the list of its models."""
FIRST_WAIT, MAX_WAIT = 1.0, 60.0
"""Seconds between two tries, at first and at most, also where a server asks for more."""
_PASSING = frozenset({408, 409, 425, 429, 404})
"""Statuses below 500 that may be others in a moment; 404 while a server starts behind a proxy."""

Request = Mapping[str, Any]
"""The body of a chat completion, as the protocol has it, without `model`."""


class Answer(NamedTuple):
    """What came of a request."""

    text: str
    """"" where it failed."""
    failure: str = ""
    """Its class: refused | empty | too long | bad answer | http 3xx | http 4xx, of what the server said of this one;
    timed out | cut off | unreachable | http 429 | http 5xx, of one that did not get to it; "" for none."""
    fingerprint: str = ""
    """The server's `system_fingerprint`."""

    @property
    def is_said(self) -> bool:
        """Whether the server's own answer is this, so that it would say the same again."""
        return self.failure in ("", "refused", "empty", "too long", "http 4xx")


class _Try(NamedTuple):
    answer: Answer
    again: bool = False
    """Whether another try may end otherwise."""
    wait: float = 0.0
    """Seconds that the server asks for."""
    why: str = ""
    """More of a failure, for a person."""


class _Unread(Exception):
    """A body that is not read, by its class of failure."""


class EndpointClient:
    """One model of one server."""

    def __init__(self, url: str, model: str, config: RequestConfig, test: Request):
        """`test`: a request with a picture that every server should answer; asked where nothing is answered."""
        openai = _library()
        self.url, self.model, self.config, self.test = url, model, config, test
        self._key = config.key()
        self._errors = (openai.APIStatusError, openai.APIConnectionError)
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=url,
            max_retries=0,
            timeout=config.deadline,
            default_headers={"Accept-Encoding": "identity"},  # a small body could unpack to any size
            http_client=openai.DefaultAioHttpClient(  # with aiohttp a request costs half as much
                follow_redirects=False, event_hooks={"response": [_bound_body]}, timeout=config.deadline
            ),
        )
        self._slots, self._testing = asyncio.Semaphore(config.in_flight), asyncio.Lock()
        self._answered = 0  # requests that the server has answered, whatever it said
        self._given_up = False
        self._not_before = 0.0  # when the next request may be sent, by the loop's clock
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, request: Request, jitter: str, keep: Callable[[Answer], Awaitable[None]]) -> Future[Answer]:
        """Send a request as soon as its turn comes.

        The future raises RunError where the endpoint answers nothing any more.

        Args:
            jitter: what the random part of the waits is drawn from.
            keep: awaited with an answer before anybody gets it.
        """
        return asyncio.run_coroutine_threadsafe(self._ask(request, random.Random(jitter), keep), self._loop)

    def get(self, url: str) -> Any:
        """The JSON at a URL, or at a path below this one's; None where there is none. RunError without an answer."""
        return asyncio.run_coroutine_threadsafe(self._get(url), self._loop).result()

    def close(self) -> None:
        """Let go of what is under way, and end the thread."""
        atexit.unregister(self.close)
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- in the thread ----

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    async def _ask(self, request: Request, draws: random.Random, keep: Callable[[Answer], Awaitable[None]]) -> Answer:
        async with self._slots:
            answered, tried = self._answered, _Try(Answer(""))
            for number in range(1 if self._given_up else self.config.tries):
                await self._wait(number, draws)
                tried = await self._try(request)
                if not tried.again:
                    break
                self._not_before = max(self._not_before, self._loop.time() + tried.wait)
            if tried.answer.failure in ("", "refused", "empty"):
                self._answered, self._given_up = self._answered + 1, False
            else:
                await self._check_answers(answered, tried)
        await keep(tried.answer)
        return tried.answer

    async def _wait(self, number: int, draws: random.Random) -> None:
        """Wait before a try: 1, 2, 4, ... seconds or as long as the server asked, and up to half as much again."""
        pause = min(MAX_WAIT, FIRST_WAIT * 2.0 ** (number - 1)) if number else 0.0
        put_off = self._not_before - self._loop.time()
        if (seconds := max(pause, put_off)) > 0:
            await asyncio.sleep(seconds * (1 + draws.random() / 2))

    async def _check_answers(self, answered: int, lost: _Try) -> None:
        """Raise RunError where nothing was answered since a request that was lost began, nor is a test picture."""
        async with self._testing:
            if self._answered > answered:
                return
            tested = await self._try(self.test)
            if tested.answer.failure in ("", "refused", "empty"):
                self._answered += 1
                return
        self._given_up = True  # until it answers again: the next shards ask once each
        raise RunError(
            f"{self.url} answers nothing, neither a request in {self.config.tries} tries nor a test picture; the last"
            f" ended so: {tested.why or lost.why}. Mend or start the server: its answers so far are kept"
        )

    async def _try(self, request: Request) -> _Try:
        status_error, connection_error = self._errors
        try:
            async with asyncio.timeout(self.config.deadline):
                # Not chat.completions.create, which takes half as long again to copy the request.
                body = {"model": self.model, **request}
                return self._read(await self._client.post("/chat/completions", cast_to=object, body=body))
        except (ValueError, RecursionError) as error:
            return self._bad_answer(f"no JSON, {type(error).__name__}")
        except _Unread as error:
            failure, why = error.args
            return _Try(Answer("", failure), why=f"{failure}, {why}")
        except status_error as error:
            return self._status(error)
        except (TimeoutError, connection_error) as error:
            failure, why = self._lost(error)
            return _Try(Answer("", failure), True, why=f"{failure}, {why}")

    def _lost(self, error: BaseException) -> tuple[str, str]:
        """The class of failure of a request without an answer, and more of it; the libraries call it all a timeout."""
        while error.__cause__ is not None:
            error = error.__cause__
        if isinstance(error, TimeoutError | asyncio.CancelledError):
            return "timed out", f"nothing came within {self.config.deadline:g} s"
        cut = isinstance(error, ConnectionResetError | ConnectionAbortedError | BrokenPipeError)
        return "unreachable" if isinstance(error, OSError) and not cut else "cut off", self._shown(error)

    def _read(self, tree: Any) -> _Try:
        try:
            tree = documents.parse(tree.encode()) if isinstance(tree, str) else tree  # of another content type
            choices = tree["choices"]
            if choices == []:
                return _Try(Answer("", "empty"))
            message, ended = choices[0]["message"], choices[0].get("finish_reason")
            text, refusal = message.get("content") or "", message.get("refusal")
            stamp = tree.get("system_fingerprint") or ""
            if not isinstance(text, str) or not isinstance(stamp, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError):
            return self._bad_answer(f"no chat completion, {str(tree)[:100]!r}")
        stamp = printable(self._without_key(stamp))
        if refusal or ended == "content_filter":
            return _Try(Answer("", "refused", stamp))
        text = self._without_key(text.encode("utf-8", "replace").decode()).strip()
        return _Try(Answer(text, "", stamp) if is_text(text) else Answer("", "empty", stamp))

    def _bad_answer(self, why: str) -> _Try:
        return _Try(Answer("", "bad answer"), True, why=f"bad answer, {self._shown(why)}")

    def _status(self, error: Any) -> _Try:
        status, code = int(error.status_code), str(error.code or "")
        if status < 500 and "content" in code and ("filter" in code or "policy" in code):
            return _Try(Answer("", "refused"))
        failure = "http 429" if status == 429 else f"http {min(status, 599) // 100}xx"
        again = status in _PASSING or status >= 500
        why = f"http {status}, {self._shown(error.message)}"
        return _Try(Answer("", failure), again, _retry_after(error.response.headers), why)

    async def _get(self, url: str) -> Any:
        status_error, connection_error = self._errors
        try:
            async with asyncio.timeout(self.config.deadline):
                return await self._client.get(url, cast_to=object)
        except (status_error, ValueError, RecursionError, _Unread):
            return None
        except (TimeoutError, connection_error) as error:
            why = self._lost(error)[1]
            raise RunError(f"{self.url} cannot be reached ({why}): start the server, or mend the address.") from None

    def _shown(self, what: object) -> str:
        return printable(self._without_key(what.decode("latin-1") if isinstance(what, bytes) else str(what)), 200)

    def _without_key(self, text: str) -> str:
        """A server may send the key back, in an error or in a text."""
        return text if self._key == NO_KEY else text.replace(self._key, HIDDEN)


async def _bound_body(response: Any) -> None:
    """Have reading a response end where it is longer than any that was asked for; a hook of the HTTP client."""
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise _Unread("bad answer", "it is compressed, which was not asked for")
    limit = MAX_BODY if response.request.method == "POST" else MAX_LIST
    response.stream = _bounded_kind(response.stream.__class__)(response.stream, limit)


@cache
def _bounded_kind(stream: Any) -> Any:
    """`_Bounded` as the HTTP library of this version of openai wants it, of its own kind."""
    return type("BoundedStream", (_Bounded, next(k for k in stream.__mro__ if k.__name__ == "AsyncByteStream")), {})


class _Bounded:
    """A body of at most so many bytes."""

    def __init__(self, stream: Any, limit: int):
        self._stream, self._limit = stream, limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > self._limit:
                raise _Unread("too long", f"more than {self._limit} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, by a number or a date; 0 where it does not say, MAX_WAIT at most."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        date = parsedate_tz(value)
        seconds = mktime_tz(date) - time.time() if date else 0.0
    return min(max(0.0, seconds), MAX_WAIT)  # 0.0 first: of "nan" it is 0


def _library() -> Any:
    try:
        import aiohttp  # noqa: F401
        import openai
    except ImportError as error:
        raise RecipeError(
            f"--captioner openai:... needs the package {error.name} on this machine: pip install 'capfilt[endpoint]'."
        ) from None
    return openai
