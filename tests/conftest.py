"""What all tests share. This folder is on the import path of the tests, so that they find `support`."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "asyncckpt", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("asyncckpt")
