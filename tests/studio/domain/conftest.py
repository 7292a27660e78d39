"""Settings of all property tests: no time limit per example, as test machines are shared."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "studio", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.load_profile("studio")
