"""A server that speaks S3 (moto's) on this host, and a proxy before it that is slow and breaks connections.

client ─→ FaultyProxy ─→ moto     answers 503, cuts a body in half, closes without an answer; so many, by a seed

`python -m tests.s3_server OUT` serves a folder until Ctrl-C.
"""

import argparse
import contextlib
import http.client
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET, KEY, SECRET = "bucket", "AKIDFORTESTS", "not-to-be-seen-anywhere"
FAULTS = ("throttled", "cut", "closed")


class S3Server:
    """moto, in threads of this process, with an empty bucket."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.host, self.port = self._server.get_host_and_port()
        self.client = self._client("s3")
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def upload(self, folder: Path, prefix: str) -> str:
        """Every file below a folder; returns the folder's URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def key_without_rights(self) -> tuple[str, str]:
        """Access key and secret of a user who may do nothing."""
        iam = self._client("iam")
        iam.create_user(UserName="nobody")
        key = iam.create_access_key(UserName="nobody")["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    @contextlib.contextmanager
    def checking_rights(self) -> Iterator[None]:
        """Keys are looked at, which moto leaves out else."""
        self._post("/moto-api/reset-auth", "0")
        try:
            yield
        finally:
            self._post("/moto-api/reset-auth", "inf")

    def stop(self) -> None:
        self._server.stop()

    def _client(self, service: str) -> Any:
        import boto3

        return boto3.client(
            service, endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET
        )

    def _post(self, path: str, body: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", path, body)
        connection.getresponse().read()
        connection.close()


class FaultyProxy:
    """Before a server.

    Args:
        target: port of the server.
        latency: seconds before each answer.
        rates: share of requests that meet each of `FAULTS`.
    """

    def __init__(
        self, target: int, *, latency: float = 0, rates: Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        self.target, self.latency, self.rates = target, latency, dict(rates or {})
        self.counts: Counter[str] = Counter()
        self.rng, self.lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fault(self) -> str | None:
        """What the next request meets."""
        with self.lock:
            self.counts["requests"] += 1
            draw = self.rng.random()
            for name in FAULTS:
                draw -= self.rates.get(name, 0)
                if draw < 0:
                    self.counts[name] += 1
                    return name
            return None

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy
    _upstream: http.client.HTTPConnection | None = None

    def do_GET(self) -> None:
        time.sleep(self.proxy.latency)
        fault = self.proxy.fault()
        if fault == "closed":
            self.close_connection = True
            return
        if fault == "throttled":
            self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>")
            return
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.target)
        self._upstream.request(self.command, self.path, headers=dict(self.headers))
        answer = self._upstream.getresponse()
        self._answer(answer.status, dict(answer.getheaders()), answer.read(), cut=fault == "cut")

    do_HEAD = do_PUT = do_GET

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with self.proxy.lock:
            self.proxy.counts["bytes"] += len(body)
        with contextlib.suppress(OSError):
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a folder by S3 on this host, in memory, until Ctrl-C.")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"{args.folder}: no such folder")
    server = S3Server()
    url = server.upload(args.folder, args.folder.resolve().name)
    print(f"export AWS_ENDPOINT_URL={server.url} AWS_ACCESS_KEY_ID={KEY} AWS_SECRET_ACCESS_KEY={SECRET}")
    print(f"--data-path {url}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    server.stop()


if __name__ == "__main__":
    main()
