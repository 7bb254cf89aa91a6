"""For every suite: no property test's verdict depends on how busy the machine is."""

from hypothesis import HealthCheck, settings

settings.register_profile("mainstay", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mainstay")
