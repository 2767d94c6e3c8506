import os

import pytest
from hypothesis import settings

# the same draws every time, and new ones by `make fuzz`, which prints how to repeat a failure
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=20)
examples = int(os.environ.get("DTME_EXAMPLES", "1000"))
settings.register_profile("fuzz", deadline=None, derandomize=False, max_examples=examples, print_blob=True)
settings.load_profile(os.environ.get("DTME_HYPOTHESIS", "ci"))


@pytest.fixture(params=["auto", "reference"])
def impl(request):
    return request.param
