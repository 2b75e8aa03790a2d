"""Hypothesis profiles: HYPOTHESIS_PROFILE=dev while writing, ci otherwise."""

import os

from hypothesis import HealthCheck, settings

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=300, print_blob=True, **common)
settings.register_profile("dev", max_examples=40, **common)
settings.register_profile("deep", max_examples=5000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
