from collections.abc import Iterator

import pytest
from tests.unit.serve.http.calls import Clients
from tests.unit.serve.http.test_server import Server


@pytest.fixture(scope="module")
def clients(long_folder) -> Iterator[Clients]:
    """The clients of one server, for a file of calls."""
    running = Server(long_folder, long_folder / "none")
    yield Clients(running)
    running.stop()
