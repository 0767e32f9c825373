"""Places that a user names: paths of this machine's file systems, and URLs of object stores.

    s3://bucket/prepared          gs://bucket/a        az://container/a        https://host/folder

A URL stands in run_config.yaml, in logs and in the list of processes, so it holds no secret: keys come from the
environment. One that has a password or a query (a signature, a token) is refused, and never shown with it.
"""

import posixpath
import re

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "https", "http")
"""Of the stores that are read."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)


def is_url(place: str) -> bool:
    """Whether a place is a URL, of whatever kind; else it is a path."""
    return _URL.match(place) is not None


def split_url(url: str) -> tuple[str, str, str]:
    """Scheme, host or bucket, and the path behind it without the slash before it."""
    scheme, host, path = _URL.match(url).groups()  # type: ignore[union-attr]  # `is_url`
    return scheme.lower(), host, path.lstrip("/")


def without_secrets(url: str) -> str:
    """A URL as it may be shown.

    >>> without_secrets("s3://user:password@bucket/a?X-Amz-Signature=1")
    's3://...@bucket/a?...'
    """
    if not is_url(url):
        return url
    scheme, host, path = split_url(url)
    path, question, _ = path.partition("?")
    user, at, host = host.rpartition("@")
    if at and _is_container(scheme, user):
        at, host = "", f"{user}@{host}"
    return f"{scheme}://{'...@' if at else ''}{host}/{path}{'?...' if question else ''}"


def check_url(what: str, url: str) -> None:
    """ValueError, one line without secrets, unless it is a URL that may be written down, of a store that is read.

    Args:
        what: the flag that it was given to.
    """
    scheme, host, path = split_url(url)
    shown = f"{what} {without_secrets(url)}"
    user, at, _ = host.rpartition("@")
    if "?" in path or (at and not _is_container(scheme, user)):
        raise ValueError(
            f"{shown}: holds a password or a query, which would stand in run_config.yaml and in logs; give the URL "
            "without it, and the keys in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3)"
        )
    if scheme == "file":
        raise ValueError(f"{shown}: found a URL of a file; give its path")
    if scheme not in SCHEMES:
        raise ValueError(f"{shown}: found {scheme}://, expected one of {', '.join(SCHEMES)}, or a path")
    if not host:
        raise ValueError(f"{shown}: names no bucket; expected {scheme}://BUCKET/FOLDER")


def refuse_url(what: str, place: str | None, instead: str) -> None:
    """ValueError, one line, where a place that has to be a path is a URL; `instead` says what to give."""
    if place is not None and is_url(place):
        raise ValueError(f"{what} {without_secrets(place)}: found a URL; {instead}")


def below(url: str, name: str) -> str:
    """The URL of `name` below the folder `url`."""
    return f"{url.rstrip('/')}/{name}"


def data_object(url: str) -> str:
    """The object that a URL of data means: itself for a manifest or JSON, else the manifest in that folder."""
    return url if url.lower().endswith((".arrow", ".json", ".jsonl", ".ndjson")) else below(url, "manifest.arrow")


def inside(name: str) -> str | None:
    """A relative name without detours; None where it leaves its folder.

    >>> inside("a//./b/../c.jpg"), inside("../c.jpg"), inside("/c.jpg")
    ('a/c.jpg', None, None)
    """
    plain = posixpath.normpath(name)
    return None if plain.startswith(("/", "../")) or plain in (".", "..") or "\0" in plain else plain


def _is_container(scheme: str, user: str) -> bool:
    """Azure's abfss://CONTAINER@ACCOUNT.dfs.core.windows.net."""
    return scheme in ("abfs", "abfss") and ":" not in user
