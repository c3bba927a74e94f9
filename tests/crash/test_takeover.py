"""A new owner clears leftovers while its trainer goes on already."""

import threading

from asyncckpt.testing import FaultyPosix, Hold, ServiceDriver
from crash.scenarios import value


def test_a_command_does_not_meet_the_sweep(tmp_path):
    """Else the sweep would take the command's temporary file for a leftover."""
    root = str(tmp_path / "run")
    with ServiceDriver(root) as driver:
        driver.save(1, value(1))
    counting = FaultyPosix()
    ServiceDriver(root, counting).close()

    sweeping, commanded = Hold(), Hold(patience=0.5)
    posix = FaultyPosix().hold("listdir", counting.counts["listdir"], sweeping).hold("create", 1, commanded)
    with ServiceDriver(root, posix) as driver:
        assert sweeping.wait_reached()
        command = threading.Thread(target=driver.rewind, args=[1])
        command.start()
        assert not commanded.wait_reached()
        sweeping.release()
        commanded.release()
        command.join(60)
    assert posix.counts["rename"] == 1
