"""obstore, as the rest of the library sees it: a client made from a URL and options, and errors that hold no secret.

obstore is imported when a URL is opened for the first time, so that a directory costs nothing of it.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar

from asyncckpt.errors import CheckpointError, NotSupportedError, StorageError
from asyncckpt.storage.urls import StorageOptions, check_url

T = TypeVar("T")

TIMEOUT = 120.0
"""Seconds that one request may take, its body included: obstore's own 30 s are too few for a part on a slow line."""
RETRY = 300.0
"""Seconds within which a request that failed is begun again."""
_BACKOFF = {"init_backoff": 0.1, "max_backoff": 10.0, "base": 2}
"""Between attempts, in seconds; obstore draws each wait at random from what these allow."""
_TURNS, _FIRST_WAIT = 6, 0.05
"""Turns of what obstore has given up, and the most seconds before the second, which is doubled from turn to turn."""
_HARMLESS = {"region", "default_region", "endpoint", "endpoint_url", "bucket", "bucket_name", "timeout", "user_agent"}
_SECRET_VARIABLE = re.compile(
    r"(SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY|ACCOUNT_KEY|SAS|MASTER_KEY|SERVICE_ACCOUNT)"
)
_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|sec|seconds?|m|min|minutes?|h|hours?)?\s*")
_UNITS = {"ms": 1e-3, "m": 60.0, "min": 60.0, "minute": 60.0, "minutes": 60.0, "h": 3600.0, "hour": 3600.0}

_KINDS = ("TimedOut", "ConnectionRefused", "ConnectionReset", "IncompleteMessage")
"""What the cause of a connection's error is called deep in what obstore says of it."""

_memories: dict[str, Any] = {}
"""What `memory://` URLs of this process name."""


def obstore() -> ModuleType:
    """
    Raises:
        NotSupportedError: it is not installed.
    """
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise NotSupportedError(
            f"URLs need the package obstore, which can't be imported ({error}): pip install 'asyncckpt[object]'"
        ) from error
    return obstore


class Cloud:
    """A client for the objects below `url`.

    `patience` are the seconds after which a request, all attempts at it together, has surely ended.

    Raises:
        NotSupportedError: obstore is not installed.
        StorageError: obstore does not take the URL or an option.
    """

    def __init__(self, url: str, options: StorageOptions) -> None:
        self.url = check_url(url)
        self.api = obstore()
        values = dict(options.values)
        client = {"timeout": TIMEOUT, **(values.pop("client_options", None) or {})}
        retry = {"max_retries": 10, "retry_timeout": RETRY, **(values.pop("retry_config", None) or {})}
        if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1"):  # obstore reads it where it is given nothing
            client.setdefault("allow_http", True)
        self._secrets = _secrets({**values, **client})
        self.patience = _seconds(client["timeout"]) + _seconds(retry["retry_timeout"])
        self.keeps_memory = self.url.startswith("memory:")
        """Whether what is put there is kept where it lies."""
        if self.keeps_memory:
            self.store = _memories.setdefault(self.url, self.api.store.MemoryStore())
            return
        secure = not any(
            str(v).startswith("http://") for k, v in {**_environment(), **values}.items() if "endpoint" in k
        )
        if self.url.startswith("s3") and secure:
            values.setdefault("unsigned_payload", True)  # TLS guards it on the way, and our digests all the way
        try:
            self.store = self.api.store.from_url(
                self.url, client_options=_client(client), retry_config=_retry(retry), **values
            )
        except (self.api.exceptions.BaseError, TypeError, ValueError) as error:
            text = self.cause(error)
            raise StorageError(f"can't use {self.url}: {text}", errno=errno.EINVAL) from None

    def __repr__(self) -> str:
        return f"Cloud({self.url!r})"

    @contextmanager
    def named(self, what: str, key: str, number: int = errno.EAGAIN) -> Iterator[None]:
        """Turn what obstore raises into a `StorageError` of our own; what is absent stays `FileNotFoundError`.

        `number` is the errno of one that may go away; that of others says that this process may not.
        """
        place = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            if _no_bucket(str(error)):
                raise StorageError(f"can't {what} {place}: {self.cause(error)}", errno=errno.EACCES) from None
            raise FileNotFoundError(errno.ENOENT, "there is no such object", place) from None
        except (self.api.exceptions.BaseError, OSError) as error:
            retryable = self.may_go_away(error)
            raise StorageError(
                f"can't {what} {place}: {self.cause(error)}",
                retryable=retryable,
                errno=number if retryable else errno.EACCES,
            ) from None

    def again(self, what: str, key: str, act: Callable[[], T], number: int = errno.EAGAIN) -> T:
        """What `act` gives, which may be done more than once; errors as `named` puts them.

        obstore begins requests again by itself, but not where an answer breaks off in its body.
        """
        deadline, longest = time.monotonic() + self.patience, 2 * _FIRST_WAIT
        for turn in range(_TURNS):
            try:
                with self.named(what, key, number):
                    return act()
            except StorageError as error:
                if not error.retryable or turn == _TURNS - 1 or time.monotonic() >= deadline:
                    raise
            time.sleep(random.uniform(0, longest))
            longest *= 2
        raise AssertionError("the last turn returns or raises")

    def may_go_away(self, error: BaseException) -> bool:
        """Whether the same request may succeed later."""
        known = self.api.exceptions
        final = known.PermissionDeniedError, known.UnauthenticatedError, known.NotSupportedError, known.InvalidPathError
        status = re.search(r"status code: (\d{3})", str(error))
        code = int(status[1]) if status else 500
        return not isinstance(error, final) and (code >= 500 or code < 400 or code in (408, 409, 412, 429))

    def cause(self, error: BaseException) -> str:
        """What obstore says, in short: the answer of the server or the error of the connection, without secrets."""
        text = str(error)
        part = re.search(r"partNumber=(\d+)", text)
        attempts = re.search(r"after (\d+) retries", text)
        status = re.search(r"status code: ([^:\n]+)", text)
        code, told = (
            re.search(r"<Code>([^<]{1,100})</Code>", text),
            re.search(r"<Message>([^<]{1,300})</Message>", text),
        )
        if status:
            said = ": ".join(found[1].strip() for found in (status, code, told) if found)
        else:
            said = " ".join(text.partition("Debug source:")[0].split()).rpartition(" - ")[2][:500]
            said += "".join(
                f" ({kind})" for kind in ("TimedOut", "ConnectionRefused", "ConnectionReset") if kind in text
            )
        where = f"part {part[1]}: " if part else ""
        tries = f", after {attempts[1]} retries" if attempts and attempts[1] != "0" else ""
        return where + self._redacted(said) + tries

    def _redacted(self, text: str) -> str:
        text = re.sub(r"(https?://[^\s?]*)\?[^\s)]*", r"\1?...", text)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _secrets(options: Mapping[str, Any]) -> list[str]:
    """Every text among the options that is not known to be harmless, and what the environment holds for clouds."""
    found = {v for k, v in os.environ.items() if _SECRET_VARIABLE.search(k) and len(v) > 7}

    def look(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                look(key, item)
        elif isinstance(value, str | bytes) and name.lower().removeprefix("aws_") not in _HARMLESS and len(value) > 3:
            found.add(value if isinstance(value, str) else value.decode("latin-1"))

    for name, value in options.items():
        look(name, value)
    return sorted(found, key=len, reverse=True)


def _environment() -> dict[str, str]:
    return {k.lower(): v for k, v in os.environ.items() if k.startswith("AWS_ENDPOINT")}


def _no_bucket(text: str) -> bool:
    """Whether it is the bucket that is not there. An object that is not there is no error; this is."""
    return any(word in text for word in ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist"))


def _seconds(value: Any) -> float:
    """Of a number, or of a text such as "2min"."""
    if isinstance(value, int | float):
        return float(value)
    total, text = 0.0, str(value)
    if not re.fullmatch(f"({_SPAN.pattern})+", text):
        raise StorageError(f"storage_options: {text!r} is no time such as '90s' or '2min'", errno=errno.EINVAL)
    for number, unit in _SPAN.findall(text):
        total += float(number) * _UNITS.get(unit, 1.0)
    return total


def _client(options: Mapping[str, Any]) -> dict[str, Any]:
    """Times are numbers of seconds here, and text for obstore."""
    timed = {k: f"{round(v * 1000)}ms" for k, v in options.items() if "time" in k and isinstance(v, int | float)}
    return {**options, **timed}


def _retry(options: Mapping[str, Any]) -> dict[str, Any]:
    backoff = {**_BACKOFF, **(options.get("backoff") or {})}
    times = {k: timedelta(seconds=_seconds(v)) for k, v in backoff.items() if k != "base"}
    return {
        "max_retries": options["max_retries"],
        "retry_timeout": timedelta(seconds=_seconds(options["retry_timeout"])),
        "backoff": {**times, "base": backoff["base"]},
    }
