"""URLs of runs, and what is given with them. Light to import: every command line does."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import msgspec

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "memory")
_PLAIN = (str, int, float, bool, bytes)


class StorageOptions(msgspec.Struct, frozen=True):
    """Options of obstore as they travel to the writer. They hold credentials: no text shows them."""

    values: dict[str, Any] = {}

    def __repr__(self) -> str:
        return "StorageOptions(...)" if self.values else "StorageOptions()"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> StorageOptions:
        """
        Raises:
            TypeError: an option is of a kind that can't be handed to the writer's process; its value is not shown.
        """
        return cls({} if options is None else {str(name): _plain(str(name), v) for name, v in options.items()})


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    if value is None or isinstance(value, _PLAIN):
        return value
    raise TypeError(
        f"storage_options: {name} is of type {type(value).__name__}, which can't be handed to the writer's process. "
        "Give text, numbers, and dicts of these; or leave credentials to the environment."
    )


def is_url(location: str) -> bool:
    return "://" in location


def check_url(url: str) -> str:
    """The URL without a slash at its end.

    Raises:
        ValueError: no kind of URL that there is, or one with credentials in it; the message shows none.
    """
    scheme, _, rest = url.partition("://")
    bare = f"{scheme}://{rest.rpartition('@')[2].partition('?')[0].partition('#')[0]}"
    if scheme not in (*SCHEMES, "file"):
        raise ValueError(
            f"{bare}: give a directory, or a URL that begins with s3://, gs://, az://, file:// or memory://"
        )
    if "@" in rest.partition("/")[0] and not scheme.startswith("abfs"):
        raise ValueError(f"{bare}: give credentials in storage_options or in the environment, not in the URL")
    if "?" in rest or "#" in rest:
        raise ValueError(f"{bare}: a URL with '?' or '#' names no run; give options in storage_options")
    if scheme != "memory" and not rest.strip("/"):
        raise ValueError(f"{bare}: the URL names no bucket")
    return url.rstrip("/")


def directory_of(url: str) -> str:
    """What a file:// URL names.

    Raises:
        ValueError: it names another host.
    """
    host, slash, path = url.removeprefix("file://").partition("/")
    if host not in ("", "localhost"):
        raise ValueError(f"{url}: it names the host {host!r}; file:///path names a directory of this machine")
    from urllib.parse import unquote  # whoever gives a directory need not wait for it

    return unquote(slash + path)


def in_this_process_only(location: str) -> bool:
    """Whether no other process sees what is kept there."""
    return location.startswith("memory:")
