"""What callers give, held against what makes sense; the messages say what to give instead."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from asyncckpt.format import names
from asyncckpt.format.pieces import MAX_CHAIN
from asyncckpt.policy.auto import Auto
from asyncckpt.policy.cadence import Cadence
from asyncckpt.policy.codec import NAMES
from asyncckpt.policy.keep import Keep
from asyncckpt.storage.urls import StorageOptions, check_url, is_url
from asyncckpt.write.messages import MirrorTo


def checked_parts(state: Mapping[str, Any], parts: Iterable[str] | None) -> list[str] | None:
    """The names of the parts to save; None for all."""
    if parts is None:
        return None
    chosen = [parts] if isinstance(parts, str) else list(parts)
    absent = [name for name in chosen if name not in state]
    if absent:
        raise ValueError(f"parts= names {', '.join(map(repr, absent))}, which the state does not have")
    return list(dict.fromkeys(chosen))


def checked_step(step: int) -> int:
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"step={step!r}: give a whole number")
    number = int(step.__index__())
    if not 0 <= number < 1 << 63:
        raise ValueError(f"step={number}: give a number from 0 to 2**63 - 1")
    return number


def checked_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    checked = {}
    for name, value in metrics.items():
        try:
            if isinstance(value, str | bytes):
                raise TypeError("text")
            number = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metrics[{name!r}] is {value!r}; give a number") from error
        if not isinstance(name, str):
            raise TypeError(f"metrics has the key {name!r}; give text")
        checked[name] = number if math.isfinite(number) else math.nan  # JSON has no inf; both read back as null
    return checked


def checked_clocks(parts: Mapping[str, Cadence]) -> dict[str, Cadence]:
    """By part, its clock."""
    if not isinstance(parts, Mapping):
        raise TypeError(f"parts={parts!r}: give a dict of parts and clocks, such as {{'optimizer': Every(steps=1000)}}")
    for part, clock in parts.items():
        if isinstance(clock, type | Auto) or not callable(getattr(clock, "due", None)):
            raise TypeError(
                f"parts={{{part!r}: {clock!r}}}: give asyncckpt.Every(steps=1000), or an object with a method "
                "due(moment); Auto can be the cadence only"
            )
    return dict(parts)


def check_clocks_fit(parts: Mapping[str, Cadence], state: Mapping[str, Any]) -> None:
    absent = [name for name in parts if name not in state]
    if absent:
        raise ValueError(f"the Checkpointer's parts= names {', '.join(absent)}, which the state does not have")


def checked_export(export: Mapping[str, str]) -> dict[str, str]:
    """By part, the dtype of its export."""
    if not isinstance(export, Mapping):
        raise TypeError(f"export={export!r}: give a dict of parts and dtypes, such as {{'model': 'bf16'}}")
    for part, dtype in export.items():
        if not isinstance(dtype, str) or dtype not in names.EXPORT_DTYPES:
            choices = ", ".join(map(repr, names.EXPORT_DTYPES))
            raise ValueError(f"export={{{part!r}: {dtype!r}}}: give one of {choices}")
        if not isinstance(part, str) or not names.is_part(names.export_part(part, dtype)):
            raise ValueError(f"export={{{part!r}: ...}}: this, with -{dtype}, becomes a file name: {names.PART_RULE}")
    return dict(export)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, choices))}")


def check_whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number from 1 on")


def check_codec(codec: object, max_chain: object, cores: object) -> None:
    check_choice("codec", codec, NAMES)
    check_whole("max_chain", max_chain)
    if isinstance(max_chain, int) and max_chain > MAX_CHAIN:
        raise ValueError(f"max_chain={max_chain}: give {MAX_CHAIN} at most")
    if cores is not None:
        check_whole("codec_cores", cores)


def check_cadence(cadence: object) -> None:
    usable = isinstance(cadence, Auto) or callable(getattr(cadence, "due", None))
    if cadence is not None and (isinstance(cadence, type) or not usable):
        raise TypeError(f"cadence={cadence!r}: give asyncckpt.Every(steps=100), or an object with a method due(moment)")


def check_keep(keep: object) -> None:
    if keep is not None and (isinstance(keep, type) or not (isinstance(keep, Keep) or callable(keep))):
        raise TypeError(
            f"keep={keep!r}: give asyncckpt.Keep(last=3), or a function from records to the steps that may go"
        )


def checked_mirror(
    directory: str | os.PathLike[str],
    mirror: str | os.PathLike[str] | None,
    keep: object,
    bandwidth: float | None,
    required: object,
    timeout: float,
    options: Mapping[str, Any] | None,
) -> MirrorTo | None:
    """What the writer is told of the mirror; None without one."""
    if mirror is None:
        if keep is not None or bandwidth is not None or required or options:
            raise ValueError(
                "mirror_keep=, mirror_bandwidth=, mirror_required= and mirror_options= are of a mirror: "
                "give mirror=, too"
            )
        return None
    if keep is not None and not isinstance(keep, Keep):
        raise TypeError(f"mirror_keep={keep!r}: give asyncckpt.Keep(last=3); a function can't be had there")
    if bandwidth is not None and not (isinstance(bandwidth, int | float) and bandwidth > 0):
        raise ValueError(f"mirror_bandwidth={bandwidth!r}: give bytes per second, more than 0")
    check_choice("mirror_required", required, (True, False))
    if not timeout > 0:
        raise ValueError(f"mirror_timeout={timeout!r}: give seconds, more than 0")
    url, here = os.fspath(mirror), os.fspath(directory)
    if is_url(here) and not here.startswith("file:"):
        raise ValueError(f"mirror={url}: only a run in a directory is mirrored; {check_url(here)} is none")
    if not is_url(url):
        url = os.path.abspath(url)
        if url == os.path.abspath(os.fspath(directory)):
            raise ValueError(f"mirror={url}: this is the directory that is to be mirrored; give another")
    return MirrorTo(url, keep, bandwidth, required is True, timeout, StorageOptions.of(options))
