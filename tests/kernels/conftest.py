import pytest
from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("ci")


@pytest.fixture(params=["auto", "reference"])
def impl(request):
    return request.param
