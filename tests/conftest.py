"""One Ray for the whole suite: started when the first test asks for it, ended with the suite."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from reelway.cluster.session import Session

# Before anything imports ray: it reads the first of these once.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listen on the loopback address only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112 -- spelt so by Ray; ten seconds otherwise

RAY_CPUS = 4


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask for the shared Ray run last: the ones before them may start one of their own."""
    shared = {item: "ray_session" in getattr(item, "fixturenames", ()) for item in items}
    for item, uses_ray in shared.items():
        if uses_ray:
            item.add_marker(pytest.mark.ray)
    items.sort(key=shared.__getitem__)


@pytest.fixture(scope="session")
def ray_session() -> "Iterator[Session]":
    """A local Ray with 4 CPUs by its own count, no GPU, and the dashboard, which Ray Train needs."""
    from reelway.cluster.session import start_or_join

    with start_or_join("local", cpus=RAY_CPUS, gpus=0, object_store_bytes=256 << 20, dashboard=True) as session:
        yield session
