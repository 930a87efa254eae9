"""What the storage tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def fault(proxy_fault):
    """Makes one fault of the proxy; see `Fault` in tests/conftest.py."""
    return proxy_fault
