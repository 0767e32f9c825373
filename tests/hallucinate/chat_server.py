"""A real HTTP server that speaks the chat-completions protocol, with the faults that real ones have."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = str | tuple[str, str] | int | None
"""An answer, alone or with its finish_reason; an HTTP error; None: none at all before the client gives up."""


class ChatServer:
    """Serves on a free port while open; `answer(caption, times)` is what the times-th request for a caption gets."""

    def __init__(self, answer: Callable[[str, int], Reply], *, delay: float = 0.0):
        self.seen: Counter[str] = Counter()
        """Requests by caption."""
        self.answered: Counter[str] = Counter()
        self.times: list[float] = []
        self.headers: list[str] = []
        self.under_way = self.most_under_way = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                caption = body["messages"][-1]["content"]
                with lock:
                    outer.seen[caption] += 1
                    outer.times.append(time.monotonic())
                    outer.headers.append(self.headers["Authorization"])
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                    reply = answer(caption, outer.seen[caption])
                time.sleep(delay)
                with lock:
                    outer.under_way -= 1
                if reply is None:
                    time.sleep(6)  # longer than --timeout in test_hallucinate_llm
                    self.close_connection = True
                elif isinstance(reply, int):
                    self.send(reply, {"error": {"message": f"error {reply}: key {self.headers['Authorization']}"}})
                elif reply == "<html>":
                    self.send(200, reply)
                else:
                    text, finish = reply if isinstance(reply, tuple) else (reply, "stop")
                    message = {"role": "assistant", "content": text}
                    choice = {"index": 0, "finish_reason": finish, "message": message}
                    self.send(
                        200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
                    )
                    with lock:
                        outer.answered[caption] += 1

            def send(self, status: int, content: object) -> None:
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0.2")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:  # a killed client
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
