"""Settings of the fuzz tests."""

from helpers import MORE
from hypothesis import HealthCheck, settings


def fuzz(examples):
    """Return a decorator that sets the number of examples, the same in each run; SRCNN_FUZZ overrides it."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=MORE or examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )
