"""What a directory or URL names: this is the one place that knows which kinds of storage there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix
from asyncckpt.storage.urls import StorageOptions, check_url, directory_of, is_url

if TYPE_CHECKING:
    from asyncckpt.storage.object import ObjectStorage


def open_storage(
    location: str, options: StorageOptions | None = None, *, posix: Posix | None = None, direct: bool = True
) -> LocalStorage | ObjectStorage:
    """The storage at a directory, or at a URL: s3:// gs:// az:// file:// memory://.

    `posix` and `direct` are for directories.

    Raises:
        ValueError: no kind of URL that there is, or options for a directory.
        NotSupportedError: obstore is not installed.
        StorageError: an option makes no sense.
    """
    options = options or StorageOptions()
    url = check_url(location) if is_url(location) else ""
    if url and not url.startswith("file:"):
        from asyncckpt.storage.object import ObjectStorage

        return ObjectStorage(url, options)
    if options.values:
        raise ValueError(f"{location}: storage_options are for URLs of object stores")
    return LocalStorage(directory_of(url) if url else location, posix, direct)
