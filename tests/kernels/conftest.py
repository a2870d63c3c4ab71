"""What the tests of the native kernels share."""

from __future__ import annotations

import pytest

from capibara.kernels import library

SETS = library.instruction_sets()
needs_native = pytest.mark.skipif(not SETS, reason="the native kernels were not built, or are turned off")


@pytest.fixture(params=SETS or [pytest.param("none", marks=needs_native)])
def forced(request: pytest.FixtureRequest):
    """Each set of this machine in turn; the best one again afterwards."""
    library.use(request.param)
    yield request.param
    library.use(SETS[0])
