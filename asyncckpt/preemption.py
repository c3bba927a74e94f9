"""Notices that this process will have to go: a signal, or what a probe of the user's finds."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from asyncckpt import signals
from asyncckpt.handle import SaveHandle

log = logging.getLogger("asyncckpt")
Probe = str | os.PathLike[str] | Callable[[], object]
_NO_NOTICE = {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGCHLD,
}
_ANSWER = 5.0
"""Seconds that an HTTP probe may take to answer."""
_LONGEST_ANSWER = 1 << 16
_ALL_WELL = (b"", b"FALSE", b"NONE")


@dataclass(frozen=True, slots=True)
class Preemption:
    """What counts as a notice to leave, and how long is left from then on.

    After the first one the next `maybe_save` saves at once, waiting for a place in the queue if it must, and
    `Checkpointer.preempted` is true from then on. A copy under way is finished and committed though the main thread be
    inside a C call.

    Args:
        signals: those that are a notice. Handlers that were there before are called as well, and put back by `close`.
            The same signal again, over a second later, is left to what was there before: by default that ends the
            process at once. Handlers can be installed on the main thread only.
        grace: seconds from the notice until the process is killed. The log says whether a save fits into it.
        probe: looked at every `poll` seconds by a thread. A path: the notice is a file that is there. A URL: the
            notice is the status 200, unless the answer is empty, `FALSE` or `NONE`. A function: a true result.
        headers: to be sent to the URL, such as {"Metadata-Flavor": "Google"}. They are kept out of logs.
        poll: seconds between two looks.

    Raises:
        ValueError, TypeError: one of them makes no sense, or nothing is left to give notice.
    """

    signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1)
    grace: float = 30.0
    probe: Probe | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    poll: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "signals", tuple(dict.fromkeys(map(_checked_signal, self.signals))))
        for name in ("grace", "poll"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"Preemption({name}={value!r}): give seconds, more than 0")
        if not self.signals and self.probe is None:
            raise ValueError("Preemption(signals=()): give a signal or a probe")
        if self.probe is not None:
            _look_of(self.probe, self.headers)
        if self.headers and not _is_url(self.probe):
            raise ValueError("Preemption(headers=...): they are for a probe that is a URL")


@dataclass(frozen=True, slots=True)
class Notice:
    reason: str
    at: float = field(default_factory=time.monotonic)


class Watch:
    """Waits for the first notice. `told` is called with it, once, on a thread of the library.

    Raises:
        ValueError: the handlers can't be installed, here or at all.
    """

    def __init__(self, preemption: Preemption, told: Callable[[Notice], None]) -> None:
        self.preemption = preemption
        self.notice: Notice | None = None
        """The first one."""
        self._told = told
        self._tell = threading.Lock()
        self._over = threading.Event()
        self._look = _look_of(preemption.probe, preemption.headers) if preemption.probe is not None else None
        self._numbers = tuple(preemption.signals)
        if self._numbers:
            signals.check(self._numbers)

    def start(self) -> None:
        if self._numbers:
            signals.listen(self, self._numbers)
        if self._look is not None:
            threading.Thread(target=self._probe, args=self._look, name="asyncckpt-probe", daemon=True).start()

    def close(self) -> None:
        """Hear nothing more. On another thread than the main one, `signals.settle` has to follow there."""
        self._over.set()
        if self._numbers:
            signals.leave(self)

    def note(self, number: int) -> None:
        if self.notice is None:
            self.notice = Notice(signal.Signals(number).name)

    def hear(self, number: int) -> None:
        self.note(number)
        self._tell_once()

    def _tell_once(self) -> None:
        notice = self.notice
        if notice is not None and self._tell.acquire(blocking=False):  # never released: it is told once
            self._told(notice)

    def _probe(self, name: str, look: Callable[[], object]) -> None:
        complained = False
        while not self._over.is_set():
            try:
                if look():
                    if self.notice is None:
                        self.notice = Notice(name)
                    self._tell_once()
                    return
                complained = False
            except Exception as error:
                if not complained:
                    log.warning("the %s, which would give notice of a preemption, can't be asked: %s", name, error)
                complained = True
            self._over.wait(self.preemption.poll)


def _checked_signal(number: int) -> signal.Signals:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"Preemption(signals=...): {number!r} is no signal; give such as signal.SIGTERM")
    if number not in signal.valid_signals() or number in _NO_NOTICE:
        raise ValueError(f"Preemption(signals=...): signal {number} can't be a notice; give such as signal.SIGTERM")
    return signal.Signals(number)


def _is_url(probe: object) -> bool:
    return isinstance(probe, str) and "://" in probe


def _look_of(probe: Probe, headers: Mapping[str, str]) -> tuple[str, Callable[[], object]]:
    """How to call a probe in messages, and the function that asks it."""
    if isinstance(probe, str) and _is_url(probe):
        url = urlsplit(probe)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise ValueError(
                "Preemption(probe=...): this URL can't be asked; give http:// or https://, a host, and credentials, if "
                "there must be any, in headers="
            )
        request = urllib.request.Request(probe, headers=dict(headers))
        return f"probe {url.scheme}://{url.netloc}{url.path}", lambda: _ask(request)
    if isinstance(probe, str | os.PathLike):
        path = Path(os.path.abspath(probe))
        return f"probe {path}", path.exists
    if not callable(probe):
        raise TypeError(f"Preemption(probe={probe!r}): give a path, a URL, or a function without arguments")
    return f"probe {getattr(probe, '__qualname__', repr(probe))}", probe


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The headers are for one host only."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def _ask(request: urllib.request.Request) -> bool:
    """Whether the answer is a notice.

    Raises:
        OSError: there is no answer, or one that means neither yes nor no.
    """
    try:
        with _opener.open(request, timeout=_ANSWER) as answer:
            text = answer.read(_LONGEST_ANSWER)
            return answer.status == 200 and text.strip().upper() not in _ALL_WELL
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            if error.code == 404:
                return False
            raise OSError(f"it answers {error.code} {error.reason}") from None


def announce(notice: Notice, grace: float, step: float | None, to_committed: float | None, in_flight: int) -> None:
    """Log the notice, and whether a save that begins after the step under way will be committed in time.

    `to_committed` is what the last save took; those in flight, and the new one, are taken to need as long.
    """
    known = [] if step is None else [f"a step takes {step:.3g} s"]
    if to_committed is None:
        known.append(f"no save was committed yet: whether one fits into the {grace:g} s of grace is not known")
    else:
        needed = (step or 0.0) + (in_flight + 1) * to_committed
        known.append(f"a save is committed after {to_committed:.3g} s")
        known.append(f"{in_flight} in flight")
        fits = "fits" if needed <= grace else "does NOT fit"
        known.append(f"{needed:.3g} s in all, which {fits} into the {grace:g} s of grace")
    log.warning("notice of a preemption (%s): the next maybe_save saves; %s", notice.reason, ", ".join(known))


def report(notice: Notice, grace: float, handle: SaveHandle) -> None:
    """Log what has become of the save that a notice asked for."""
    step, after = handle.step, time.monotonic() - notice.at
    if handle.outcome != "committed":
        log.error("step %d, saved upon the notice, is %s: %s", step, handle.outcome, handle.error)
    elif after <= grace:
        log.info("step %d was committed %.3g s after the notice: within the %g s of grace", step, after, grace)
    else:
        log.warning(
            "step %d was committed %.3g s after the notice, and %g s of grace are over", handle.step, after, grace
        )
