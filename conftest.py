"""For every suite: no property test's verdict depends on how busy the machine is; the collector gets little time."""

import gc

from hypothesis import HealthCheck, settings

settings.register_profile("mainstay", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mainstay")


def pytest_collection_finish() -> None:
    """Spare what all tests share; what one leaves behind, such as a coroutine never awaited, is still found."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
