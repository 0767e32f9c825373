"""Bytes of object stores, by URL: the one file that talks to them, through obstore (Rust's object_store).

    url ─→ store of its bucket ─→ GET, with retries and back-off ─→ bytes
                                     └ no such object: NoSuchObject; all else that ends the retries: StoreError

obstore answers 5xx, 429, time-outs and cut connections by asking again, a body that broke off from where it did, and
it lets go of the interpreter's lock meanwhile. Its messages hold request URLs and whole XML answers; ours hold neither.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from hacl_megatron.config.files.urls import check_url, split_url, without_secrets

RETRY_SECONDS, FIRST_LOOK_SECONDS = 180, 20
"""How long a request is repeated in a run, and at its start, where a wrong name or address is likelier."""
FIRST_PAUSE_SECONDS = 0.5
"""Before the second try; later pauses grow, by chance, up to 15 s."""
_MOST_RETRIES = 100
"""So many that the time ends them."""
_KEYS = (
    "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE",
)  # fmt: skip
"""Environment variables by which obstore itself finds credentials for s3."""


class NoSuchObject(FileNotFoundError):
    """The store says that there is no such object. One line."""


class StoreError(ValueError):
    """A store that does not answer, or denies access, or has no such bucket: no fault of one object. One line."""


class ObjectChanged(StoreError):
    """The object is another than the one that was asked for."""


class NotThatLong(ValueError):
    """The object ends before the bytes that were asked for."""


class TooLarge(ValueError):
    """The object has `size` bytes, more than may be read."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__(f"{url}: has {size:,} bytes, too many")
        self.size = size


@dataclass(frozen=True, slots=True)
class ObjectState:
    """What tells an object from one that takes its place."""

    size: int
    """Bytes."""
    version: str
    """Its ETag; where a store gives none, when it was written."""


def object_state(url: str, *, first_look: bool = False) -> ObjectState:
    """Of an object. Raises NoSuchObject, StoreError.

    A GET of one byte, not a HEAD, whose answers cannot say whether the key is missing or the bucket.
    """
    with _errors(url):
        try:
            return _state(_get(url, first_look, {"range": (0, 1)}).meta)
        except _obstore().exceptions.GenericError as error:
            if _status(error) != "416":  # an empty object has no first byte
                raise
        return _state(_get(url, first_look, {}).meta)


def read_object(url: str, *, most: int, unless: str | None = None) -> tuple[bytes, ObjectState] | None:
    """A whole object and its state; None where its version is `unless`.

    Raises NoSuchObject, TooLarge where it has more than `most` bytes, StoreError.
    """
    exceptions = _obstore().exceptions
    with _errors(url):
        is_tag = unless is not None and unless.startswith(('"', "W/"))
        try:
            result = _get(url, False, {"if_none_match": unless} if is_tag else {})
        except exceptions.NotModifiedError:
            return None
        state = _state(result.meta)
        if unless is not None and state.version == unless:
            return None
        if state.size > most:
            raise TooLarge(without_secrets(url), state.size)
        return bytes(result.bytes()), state


def read_range(url: str, offset: int, size: int, *, version: str | None = None) -> bytes:
    """`size` bytes of an object, at least one.

    Args:
        version: of `ObjectState`; ObjectChanged where the object has another by now.

    Raises NoSuchObject, NotThatLong, StoreError.
    """
    with _errors(url):
        options: dict[str, Any] = {"range": (offset, offset + size)}
        if version is not None and version.startswith('"'):
            options["if_match"] = version
        try:
            data = bytes(_get(url, False, options).bytes())
        except _obstore().exceptions.PreconditionError:
            raise ObjectChanged(f"{url}: changed while it was read; start again when it is finished") from None
        except _obstore().exceptions.GenericError as error:
            if _status(error) != "416":
                raise
            data = b""
    if len(data) != size:
        raise NotThatLong(f"{url}: ends before byte {offset + size}")
    return data


def names_in(url: str) -> Iterator[str]:
    """Names of the objects directly in the folder `url`. Raises StoreError; a folder that is not there has none."""
    prefix = split_url(url)[2].rstrip("/") + "/"
    with _errors(url):
        for some in _obstore().list(_store(*_bucket(url), False), prefix, chunk_size=1000):
            yield from (name for item in some if "/" not in (name := item["path"][len(prefix) :]))


def expect_object(what: str, url: str) -> None:
    """ValueError unless the object is there and may be read."""
    check_url(what, url)
    try:
        object_state(url, first_look=True)
    except NoSuchObject:
        raise ValueError(
            f"{what} {url}: no such object; expected LLaVA JSON (.json, .jsonl), or a folder of tools/prepare_data.py"
        ) from None
    except StoreError as error:
        raise ValueError(f"{what} {error}") from None


def expect_bucket(what: str, url: str) -> None:
    """ValueError unless the store of a folder can be reached and has the bucket; what is in it stays open.

    Keys that may read objects need not be allowed to list them, so that a denied look says nothing.
    """
    check_url(what, url)
    try:
        object_state(url.rstrip("/") + "/.hacl_megatron", first_look=True)
    except NoSuchObject:
        return
    except StoreError as error:
        if "AccessDenied" not in str(error):
            raise ValueError(f"{what} {error}") from None


# ------------------------------------------------------------------------------------------------------------- obstore


@lru_cache(1)
def _obstore() -> Any:
    try:
        import obstore
    except ImportError:
        raise StoreError(
            "a URL needs the package obstore, which is not installed; pip install obstore, or give a path"
        ) from None
    return obstore


def _get(url: str, first_look: bool, options: dict[str, Any]) -> Any:
    return _obstore().get(_store(*_bucket(url), first_look), split_url(url)[2], options=options)


def _bucket(url: str) -> tuple[str, str]:
    scheme, host, _ = split_url(url)
    return scheme, host


@lru_cache(64)
def _store(scheme: str, host: str, first_look: bool) -> Any:
    """The bucket's store, whose connections all threads share."""
    _obstore()
    from obstore.store import from_url

    check_url("", f"{scheme}://{host}/")
    endpoint = _endpoint() if scheme in ("s3", "s3a") else f"{scheme}:"
    options: dict[str, Any] = {
        "client_options": {"connect_timeout": "10s", "timeout": "60s", "allow_http": endpoint.startswith("http:")},
        "retry_config": {
            "max_retries": _MOST_RETRIES,
            "backoff": {  # each pause is drawn between the first and `base` times the last: less than e does not grow
                "base": 4,
                "init_backoff": timedelta(seconds=FIRST_PAUSE_SECONDS),
                "max_backoff": timedelta(seconds=15),
            },
            "retry_timeout": timedelta(seconds=FIRST_LOOK_SECONDS if first_look else RETRY_SECONDS),
        },
    }
    if scheme in ("s3", "s3a"):
        options |= _from_profile()
    try:
        return from_url(f"{scheme}://{host}", **options)
    except _obstore().exceptions.BaseError as error:
        raise StoreError(f"{scheme}://{host}: {_short(error)}; check the URL and the environment") from None


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _from_profile() -> dict[str, Any]:
    """Credentials as the AWS command line finds them in ~/.aws, where the environment holds none."""
    if any(os.environ.get(name) for name in _KEYS):
        return {}
    files = [os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"]
    files += [os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"]
    if not any(Path(file).expanduser().is_file() for file in files):
        return {}  # the machine's own role, by its metadata
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise StoreError(
            "found profiles in ~/.aws, which boto3 reads, and that is not installed; pip install boto3, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    try:
        return {"credential_provider": Boto3CredentialProvider()}
    except Exception as error:  # botocore's: no such profile, no credentials in it
        raise StoreError(f"the profile of ~/.aws gives no credentials ({type(error).__name__}); check it") from None


def _state(meta: Any) -> ObjectState:
    return ObjectState(meta["size"], meta["e_tag"] or str(meta["last_modified"]))


# -------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turns obstore's errors into ours, without obstore's as their cause, for that holds the request."""
    try:
        yield
    except (NoSuchObject, TooLarge, StoreError):
        raise
    except (_obstore().exceptions.BaseError, OSError, ValueError) as error:
        raise _translated(error, url) from None


def _translated(error: BaseException, url: str) -> Exception:
    where, exceptions = without_secrets(url), _obstore().exceptions
    text, code = str(error), _code(error)
    scheme, host, _ = split_url(url)
    if code == "NoSuchBucket":
        return StoreError(f"{where}: there is no bucket {host} at {_shown_endpoint(scheme)}; check name and address")
    if isinstance(error, FileNotFoundError):
        return NoSuchObject(f"{where}: no such object")
    if _status(error) in ("401", "403") or isinstance(
        error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
    ):
        if "169.254." in text or "metadata" in text.lower():
            return StoreError(
                f"{where}: found no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        return StoreError(
            f"{where}: access denied ({code or 'AccessDenied'}); check the credentials and what they allow: S3 says "
            "this of a missing object too, where the bucket may not be listed"
        )
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed") or _status(error) == "301":
        return StoreError(f"{where}: the bucket is in another region; set AWS_REGION to it")
    if "169.254." in text:
        return StoreError(
            f"{where}: found no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    return StoreError(f"{where}: cannot be read from {_shown_endpoint(scheme)} ({_short(error)})")


def _shown_endpoint(scheme: str) -> str:
    if scheme not in ("s3", "s3a"):
        return "the store"
    return without_secrets(_endpoint()).rstrip("/") or "AWS (AWS_ENDPOINT_URL is not set)"


def _status(error: BaseException) -> str | None:
    found = re.search(r"status code: (\d{3})", str(error))
    return found and found[1]


def _code(error: BaseException) -> str | None:
    """S3's own name of a fault, where an answer holds it."""
    found = re.search(r"<Code>(\w{1,60})</Code>", str(error))
    return found and found[1]


_FAULTS = ("dns error", "Connection refused", "Connection reset", "timed out", "IncompleteMessage", "certificate")


def _short(error: BaseException) -> str:
    """What is wrong in a few words that hold no request and no secret."""
    text, words = str(error), []
    if status := _status(error):
        words.append(f"answer {status} {_code(error) or ''}".strip())
    words += [fault for fault in _FAULTS if fault.lower() in text.lower()]
    if not words:
        words.append("no answer" if "error sending request" in text else type(error).__name__)
    if retries := re.search(r"after (\d+) retries", text):
        words.append(f"after {retries[1]} retries")
    return ", ".join(words)
