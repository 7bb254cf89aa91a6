"""What most tests of this package take."""

import pytest

from mainstay.core.testing import VirtualClock


@pytest.fixture
def clock() -> VirtualClock:
    """Time that moves when the test says so."""
    return VirtualClock()
