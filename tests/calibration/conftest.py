"""What holds in every test of this folder."""

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """There are as many threads after a test as before."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before
