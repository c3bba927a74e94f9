"""What all tests share. This folder is on the import path of the tests, so that they find `support`."""

import os

# Before torch is loaded, here and in the processes that tests start: its OpenMP threads neither survive a fork nor
# share two cores with another test process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "asyncckpt", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("asyncckpt")
