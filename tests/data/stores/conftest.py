"""One S3 server for a file of tests, and its keys in the environment."""

from collections.abc import Iterator

import pytest

from hacl_megatron.config.files import objects
from tests.s3_server import KEY, SECRET, S3Server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    started = S3Server()
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    """Address and keys; no profile of whoever runs the tests; stores anew, for they remember their address."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    if "server" in request.fixturenames:
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("server").url)
    monkeypatch.setattr(objects, "FIRST_PAUSE_SECONDS", 0.05)
    objects._store.cache_clear()
    yield
    objects._store.cache_clear()
