"""The figures of the rig, summed up at the end of a run."""

from collections import Counter

import pytest


@pytest.fixture
def figure(request):
    """`figure("kills", 7)`: seven more kills were tried."""
    return lambda name, count: request.node.user_properties.append((name, count))


def pytest_terminal_summary(terminalreporter):
    total = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call" and "crash" in report.nodeid:
                for name, count in report.user_properties:
                    total[name] += count
    if total:
        shown = ", ".join(f"{count:,} {name}" for name, count in sorted(total.items()))
        terminalreporter.write_line(f"crash rig: {shown}")
