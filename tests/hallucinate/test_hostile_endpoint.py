"""Endpoints that never end, or send more than memory holds: a request is bounded in time and size, and rc says so.

Before, `--timeout` was between two bytes: a reply that drips hung the run, one of 6 GB was read whole and unpacked.
"""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hacl_megatron.hallucinate.endpoint_http import MOST_BYTES
from tests.hallucinate.chat_server import ChatServer
from tests.tool_runs import run_tool

pytest.importorskip("openai")

BOMB = gzip.compress(b"\0" * (16 << 20))
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Socket:
    """One connection, after its request was read."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.sent = 0

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)
        self.sent += len(data)


def drip_a_body(to: Socket) -> None:
    to.send(OK + b"Content-Length: 1000\r\n\r\n")
    for _ in range(1000):
        to.send(b" ")
        time.sleep(0.1)


def drip_a_header(to: Socket) -> None:
    to.send(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(1000):
        to.send(b"a")
        time.sleep(0.1)


def send_6_gb(to: Socket) -> None:
    to.send(OK + b"Content-Length: 6000000000\r\n\r\n")
    for _ in range(6000):
        to.send(b" " * 1_000_000)


def send_6_gb_with_a_redirect(to: Socket) -> None:
    to.send(b"HTTP/1.1 307 Go on\r\nLocation: /v1/elsewhere\r\nContent-Length: 6000000000\r\n\r\n")
    for _ in range(6000):
        to.send(b" " * 1_000_000)


def send_a_bomb(to: Socket) -> None:
    to.send(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB)


def nest_deep(to: Socket) -> None:
    body = b"[" * 200_000 + b"]" * 200_000
    to.send(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)


@contextmanager
def serving(answer: Callable[[Socket], None]) -> Iterator[tuple[str, list[Socket]]]:
    """A server that answers each request so; its URL and its connections."""
    connections: list[Socket] = []

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            connections.append(Socket(connection))
            answer(connections[-1])
            time.sleep(0.1)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", connections
    finally:
        listener.close()


def ask(folder: Path, url: str, count: int, *flags: object) -> int:
    records = [
        {"id": n, "image": f"{n}.jpg", "conversations": [], "text": f"A red dog {n} here."} for n in range(count)
    ]
    (folder / "in.json").write_text(json.dumps(records))
    files = ["--input", folder / "in.json", "--output", folder / "out.json"]
    return run_tool("generate_hallucinations", "--method", "llm", "--model", "m", "--base-url", url, *files, *flags)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (drip_a_body, "within 1 s"),
        (drip_a_header, "within 1 s"),
        (send_6_gb, "larger than"),
        (send_6_gb_with_a_redirect, "larger than"),
        (send_a_bomb, "compressed"),
        (nest_deep, "no answer: "),
    ],
)
def test_a_request_has_its_time_and_its_size(tmp_path, capfd, monkeypatch, answer, said):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    started = time.monotonic()
    with serving(answer) as (url, connections):
        assert ask(tmp_path, url, 1, "--timeout", 1, "--max-retries", 0) == 1
        assert time.monotonic() - started < 30  # 100 s and more before; a busy machine
    assert len(connections) == 1 and connections[0].sent < MOST_BYTES + (16 << 20)  # what sockets hold on top
    (rejected,) = [json.loads(line) for line in (tmp_path / "out.json.rejected.jsonl").read_text().splitlines()]
    assert said in rejected["rejected"][0]["reason"], rejected
    errors = capfd.readouterr().err
    assert said in errors and "Traceback" not in errors


def test_a_slow_reply_is_asked_for_again(tmp_path, monkeypatch):
    """A time-out of the whole stays one of the client's: it is retried. A server that is slow once costs no caption."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    times = iter([drip_a_body])

    def first_slow(to: Socket) -> None:
        next(times, answer_at_once)(to)

    with serving(first_slow) as (url, connections):
        assert ask(tmp_path, url, 1, "--timeout", 1, "--max-retries", 1) == 0
    assert len(connections) == 2


def answer_at_once(to: Socket) -> None:
    message = {"role": "assistant", "content": "A blue cat 0 here."}
    reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    body = json.dumps({**reply, "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}).encode()
    to.send(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize("flags", [[], ["--fill-with-rules"]])
def test_a_model_that_answers_nothing_of_use_is_a_failure(tmp_path, capfd, monkeypatch, flags):
    """It was rc 0: a batch script went on to train without a hallucinated caption, or with the rules' alone."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with ChatServer(lambda *_: "I'm sorry, but I can't help with that.") as server:
        assert ask(tmp_path, server.url, 3, "--attempts", 1, *flags) == 1
    errors = capfd.readouterr().err
    assert "none of 3 captions got a usable answer, the last: a refusal" in errors and "--force" in errors
    with ChatServer(lambda caption, _: caption.replace("red dog", "blue cat") if " 0 " in caption else 500) as server:
        assert ask(tmp_path, server.url, 3, "--max-retries", 0, "--attempts", 2, "--force", *flags) == 0
