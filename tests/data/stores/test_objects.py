"""Objects of a real S3 server: their bytes, and what is said of one that cannot be read. boto3 wrote them."""

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hacl_megatron.config.files import objects
from hacl_megatron.config.files.objects import (
    NoSuchObject,
    NotThatLong,
    ObjectChanged,
    StoreError,
    TooLarge,
    expect_bucket,
    expect_object,
    names_in,
    object_state,
    read_object,
    read_range,
)
from hacl_megatron.config.files.urls import check_url, inside, is_url, without_secrets
from tests.s3_server import BUCKET, FAULTS, SECRET, FaultyProxy

DATA = random.Random(0).randbytes(100_000)
ODD = "a b/ü%20#+&=;,'é.bin"


@pytest.fixture(scope="module", autouse=True)
def written(server) -> None:
    server.put("d/x.bin", DATA)
    server.put(f"d/{ODD}", b"odd")
    server.put("d/empty.bin", b"")


def url(name: str, bucket: str = BUCKET) -> str:
    return f"s3://{bucket}/d/{name}"


def test_bytes_are_those_that_were_written() -> None:
    """Catches ranges that are off by one or that clip, names quoted twice, an empty object taken as missing."""
    data, state = read_object(url("x.bin"), most=len(DATA))
    assert data == DATA and state == object_state(url("x.bin")) and state.size == len(DATA)
    assert read_range(url("x.bin"), 0, 1) == DATA[:1]
    assert read_range(url("x.bin"), 77_777, 22_223, version=state.version) == DATA[77_777:]
    assert read_object(url(ODD), most=10)[0] == b"odd"
    assert read_object(url("empty.bin"), most=10)[0] == b"" and object_state(url("empty.bin")).size == 0
    assert read_object(url("x.bin"), most=len(DATA), unless=state.version) is None
    assert sorted(names_in(f"s3://{BUCKET}/d/")) == ["empty.bin", "x.bin"], "not what lies in folders below"


def test_what_is_not_there_as_asked_is_an_error_of_its_own() -> None:
    """A clipped range and a replaced object must not pass for bytes; a large one is not read."""
    for offset in (99_999, 200_000):
        with pytest.raises(NotThatLong):
            read_range(url("x.bin"), offset, 10)
    with pytest.raises(ObjectChanged):
        read_range(url("x.bin"), 0, 10, version='"another"')
    with pytest.raises(TooLarge):
        read_object(url("x.bin"), most=len(DATA) - 1)
    with pytest.raises(NoSuchObject, match=r"^s3://bucket/d/y\.bin: no such object$"):
        read_range(url("y.bin"), 0, 10)


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    line = str(error.value)
    assert "\n" not in line and len(line) < 300, line
    assert SECRET not in line and "Signature=" not in line and "<" not in line, line
    assert all(word in line for word in words), line
    assert error.value.__cause__ is None and error.value.__suppress_context__, "its cause would print the request"


def test_missing_buckets_and_denied_access_are_said_in_one_line(server, monkeypatch) -> None:
    """Also where one is the other's answer: without the right to list, S3 denies what is missing."""
    with pytest.raises(ValueError) as error:
        expect_object("--data-path", url("y.bin", "no-such-bucket"))
    one_line(error, "--data-path s3://no-such-bucket/d/y.bin", "there is no bucket no-such-bucket", server.url)
    with pytest.raises(ValueError) as error:
        expect_bucket("--image-folder", "s3://no-such-bucket/d")
    one_line(error, "there is no bucket no-such-bucket")
    expect_bucket("--image-folder", f"s3://{BUCKET}/no/such/folder")
    with pytest.raises(ValueError) as error:
        expect_object("--data-path", url("y.bin"))
    one_line(error, "no such object; expected LLaVA JSON")
    key, secret = server.key_without_rights()
    with server.checking_rights():
        for key_id, secret_key, code in (
            (key, secret, "AccessDenied"),
            (key, "wrong", "SignatureDoesNotMatch"),
            ("AKIDUNKNOWN", SECRET, "InvalidAccessKeyId"),
        ):
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key_id)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
            objects._store.cache_clear()
            with pytest.raises(StoreError) as error:
                read_range(url("x.bin"), 0, 1)
            one_line(error, f"access denied ({code})", "check the credentials")
            if code == "AccessDenied":
                expect_bucket("--image-folder", f"s3://{BUCKET}/d")  # who may not list it may still read what is there
            else:
                with pytest.raises(ValueError, match=code):
                    expect_bucket("--image-folder", f"s3://{BUCKET}/d")


def test_an_address_without_a_server_is_said(monkeypatch) -> None:
    """With the address but without a password in it."""
    monkeypatch.setattr(objects, "FIRST_LOOK_SECONDS", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:hidden@127.0.0.1:9")
    objects._store.cache_clear()
    with pytest.raises(ValueError) as error:
        expect_object("--data-path", url("x.bin"))
    one_line(error, "cannot be read from http://...@127.0.0.1:9", "Connection refused")
    assert "hidden" not in str(error.value)


def test_nothing_is_lost_under_faults(server, monkeypatch) -> None:
    """5 % of each: 503, a body cut in half, a connection closed without an answer. Catches reads without retries."""
    proxy = FaultyProxy(server.port, rates=dict.fromkeys(FAULTS, 0.05))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    objects._store.cache_clear()
    rng = random.Random(1)
    places = [(rng.randrange(90_000), rng.randrange(1, 10_000)) for _ in range(300)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda place: read_range(url("x.bin"), *place), places))
        whole = list(threads.map(lambda _: read_object(url("x.bin"), most=len(DATA))[0], range(60)))
    proxy.stop()
    assert found == [DATA[offset : offset + size] for offset, size in places]
    assert all(data == DATA for data in whole)
    assert all(proxy.counts[name] >= 5 for name in FAULTS), proxy.counts


def test_a_store_that_stays_away_is_no_fault_of_an_object(server, monkeypatch) -> None:
    """It must not end as an unusable image, which a run would leave out."""
    proxy = FaultyProxy(server.port, rates={"throttled": 1.0})
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(objects, "RETRY_SECONDS", 1)
    objects._store.cache_clear()
    with pytest.raises(StoreError) as error:
        read_range(url("x.bin"), 0, 10)
    proxy.stop()
    one_line(error, "answer 503 SlowDown", "retries")
    assert proxy.counts["throttled"] > 2


def test_a_store_that_comes_back_costs_nothing(server, monkeypatch) -> None:
    """For longer than a dozen short pauses: catches a number of retries that ends before their time does."""
    proxy = FaultyProxy(server.port, rates={"throttled": 1.0})
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    objects._store.cache_clear()
    back = threading.Timer(6, proxy.rates.clear)
    back.start()
    assert read_range(url("x.bin"), 5, 10) == DATA[5:15]
    back.cancel()
    proxy.stop()


def test_a_package_that_is_not_installed_is_said(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    objects._obstore.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"--data-path a URL needs the package obstore.*pip install obstore"):
            expect_object("--data-path", url("x.bin"))
    finally:
        objects._obstore.cache_clear()


@pytest.mark.parametrize(
    "given, shown",
    [
        ("s3://user:hidden@bucket/a", "s3://...@bucket/a"),
        ("https://host/a?X-Amz-Signature=hidden", "https://host/a?..."),
        ("s3://hidden@bucket/a", "s3://...@bucket/a"),
        ("abfss://box:hidden@account.dfs.core.windows.net/a", "abfss://...@account.dfs.core.windows.net/a"),
        ("sftp://host/a", "sftp://host/a"),
        ("s3:///a", "s3:///a"),
    ],
)
def test_urls_that_are_refused(given: str, shown: str) -> None:
    """A secret would stand in run_config.yaml; it must not be shown by its refusal either."""
    with pytest.raises(ValueError) as error:
        check_url("--data-path", given)
    assert str(error.value).startswith(f"--data-path {shown}:") and "hidden" not in str(error.value)
    assert without_secrets(given) == shown


def test_what_is_a_url_and_what_a_name_inside_a_folder() -> None:
    assert is_url("s3://b/a") and not is_url("s3:/b") and not is_url("/a/b://c") and not is_url("C:\\a")
    check_url("", "abfss://box@account.dfs.core.windows.net/a@b")
    names = ("a//./b/../c.jpg", "../c.jpg", "a/../../c.jpg", "/c.jpg", "..", ".", "a\0b", "..c")
    assert [inside(name) for name in names] == ["a/c.jpg", None, None, None, None, None, None, "..c"]
