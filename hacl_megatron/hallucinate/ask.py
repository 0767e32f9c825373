"""Asks a language model for hallucinated captions over any OpenAI-compatible endpoint.

    records ─→ missing answers ─≤ concurrency at once, paced→ endpoint ─→ answer log ─check→ ask again, or done

Back-off and retries (time-outs, 429 with its Retry-After, 5xx) are the `openai` client's own; how long and how large a
reply may be is `endpoint_http`'s to say. The key is read by that client from the environment and appears in no message.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hacl_megatron.data.prepare.json_text import is_text
from hacl_megatron.hallucinate.answers import AnswerLog, answer_key
from hacl_megatron.hallucinate.checks import cleaned, fault_of
from hacl_megatron.hallucinate.endpoint_http import bounded_client
from hacl_megatron.hallucinate.prompt import VERSION, messages

_GIVE_UP_AFTER = 20
"""Captions in a row that the endpoint failed on, after all retries, before the run stops."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where and how to ask."""

    model: str
    base_url: str | None = None
    """None: the client's default (OPENAI_BASE_URL, or OpenAI)."""
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 60.0
    """Seconds for one request as a whole, its reply read."""
    max_retries: int = 6
    temperature: float = 1.0
    max_tokens: int = 512


@dataclass
class Verdict:
    """What the answers so far give for one caption."""

    accepted: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(answer, reason) of each answer that is no hallucinated caption."""
    missing: tuple[int, int] | None = None
    """(number of the caption, attempt) to ask for next; None when done."""


def judge(log: AnswerLog, endpoint: Endpoint, name: str, caption: str, *, count: int, attempts: int) -> Verdict:
    """Goes through the answers for one caption, in the order they were asked for; depends on the log alone.

    A caption that is no text cannot be sent, nor trained on: nothing is missing then.
    """
    verdict = Verdict()
    if not is_text(caption):
        verdict.refused.append(("", "not asked: the caption is no Unicode text (it holds half of a surrogate pair)"))
        return verdict
    for number in range(count):
        for attempt in range(attempts):
            answer = log.get(request_key(endpoint, name, caption, number, attempt))
            if answer is None:
                verdict.missing = (number, attempt)
                return verdict
            text, complete = cleaned(answer[0]), answer[1]
            reason = fault_of(text, caption, verdict.accepted) if complete else "cut off at --max-tokens"
            if reason is None:
                verdict.accepted.append(text)
                break
            verdict.refused.append((answer[0], reason))
    return verdict


def request_key(endpoint: Endpoint, name: str, caption: str, number: int, attempt: int) -> bytes:
    """The key of a request's answer in the log."""
    return answer_key(VERSION, endpoint.model, endpoint.temperature, name, caption, number, attempt)


class Pace:
    """Lets requests through at even distances."""

    def __init__(self, per_minute: float | None):
        self._distance = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self.passed = 0
        """Requests let through, the client's retries included."""

    async def wait(self) -> None:
        """Returns when the next request may go out."""
        self.passed += 1
        if self._distance:
            now = asyncio.get_running_loop().time()
            slot = max(now, self._next)
            self._next = slot + self._distance
            await asyncio.sleep(slot - now)


def import_openai():  # a module
    """The `openai` package. Raises ValueError that says how to install it."""
    try:
        import openai
    except ImportError as error:
        raise ValueError("--method llm needs the openai package: pip install 'hacl_megatron[llm]'") from error
    return openai


def ask_all(
    items: Iterable[tuple[str, str]],
    endpoint: Endpoint,
    log: AnswerLog,
    *,
    count: int,
    attempts: int,
    progress: Callable[[], None],
) -> tuple[int, dict[bytes, str]]:
    """Asks until every (name, caption) has `count` accepted answers or its attempts are used up.

    Returns the number of requests sent and, for requests that got no answer, key -> reason. Raises ValueError on what
    no retry mends: a wrong key, an unknown model, an endpoint that fails again and again. The log keeps what came.
    """
    return asyncio.run(_ask_all(items, endpoint, log, count, attempts, progress))


async def _ask_all(items, endpoint, log, count, attempts, progress):
    openai = import_openai()
    key = os.environ.get("OPENAI_API_KEY")
    if not key and endpoint.base_url is None and not os.environ.get("OPENAI_BASE_URL"):
        raise ValueError("OPENAI_API_KEY is not set; set it, or name a server that needs none with --base-url")
    pace = Pace(endpoint.requests_per_minute)
    client = openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=endpoint.base_url,
        timeout=endpoint.timeout,
        max_retries=endpoint.max_retries,
        # below the client: its own retries are paced and counted too
        http_client=bounded_client(openai, timeout=endpoint.timeout, before=pace.wait),
    )
    failed: dict[bytes, str] = {}
    in_a_row = 0

    def hidden(error: BaseException) -> str:
        why = error.__cause__
        text = " ".join(f"{error} ({why})".split() if why is not None and str(why) else str(error).split())
        return (text.replace(key, "[key]") if key else text)[:300] or type(error).__name__

    async def one(name: str, caption: str) -> None:
        nonlocal in_a_row
        while True:
            verdict = judge(log, endpoint, name, caption, count=count, attempts=attempts)
            if verdict.missing is None:
                return
            request = request_key(endpoint, name, caption, *verdict.missing)
            try:
                reply = await client.chat.completions.create(
                    model=endpoint.model,
                    messages=messages(caption, verdict.missing[0]),
                    temperature=endpoint.temperature,
                    max_tokens=endpoint.max_tokens,
                )
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ValueError(
                    f"the endpoint refuses (HTTP {error.status_code}): check OPENAI_API_KEY, --model and --base-url "
                    f"({type(error).__name__})"
                ) from None
            except (openai.OpenAIError, ValueError, RecursionError) as error:  # the last two: a body that is no JSON
                failed[request] = f"no answer: {hidden(error)}"
                in_a_row += 1
                if in_a_row >= _GIVE_UP_AFTER:
                    raise ValueError(
                        f"the endpoint failed on {in_a_row} captions in a row, the last with: {hidden(error)}; the "
                        f"{len(log):,} answers so far are in {log.path}, the same command goes on from there"
                    ) from None
                return
            answer = _text_of(reply)
            if answer is None:
                failed[request] = "no answer: the reply is no chat completion"
                in_a_row += 1
                if in_a_row >= _GIVE_UP_AFTER:
                    raise ValueError(f"{in_a_row} replies in a row were no chat completions; check --base-url")
                return
            in_a_row = 0
            log.add(request, name, *answer)

    running: dict[tuple[str, str], asyncio.Task] = {}
    try:
        for item in items:
            if item in running:
                continue  # the same record twice: its answers serve both
            while len(running) >= endpoint.concurrency:
                await _first_done(running, progress)
            running[item] = asyncio.create_task(one(*item))
        while running:
            await _first_done(running, progress)
    finally:
        for task in running.values():
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)
        await client.close()
    return pace.passed, failed


async def _first_done(running: dict[tuple[str, str], asyncio.Task], progress: Callable[[], None]) -> None:
    done, _ = await asyncio.wait(running.values(), return_when=asyncio.FIRST_COMPLETED)
    for item in [item for item, task in running.items() if task in done]:
        running.pop(item).result()  # raises what the task raised
        progress()


def _text_of(reply: object) -> tuple[str, bool] | None:
    """(text, whether it is complete) of a chat completion, "" for an explicit refusal; None if it is something else."""
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if message is None:
        return None
    content = getattr(message, "content", None)
    complete = getattr(choices[0], "finish_reason", None) != "length"
    return (content if isinstance(content, str) else ""), complete
