import signal
import threading

import pytest
from support.processes import until


@pytest.fixture
def signals_are_left_as_they_were():
    """No test may leave a handler, a wakeup fd or a thread behind."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1
    until(lambda: "asyncckpt-signals" not in {thread.name for thread in threading.enumerate()})
