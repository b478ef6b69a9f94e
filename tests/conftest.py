"""How the tests are dealt to two processes (`make test`): whole files, and all that start Ray to one of them.

Examples of property tests have no deadline.
"""

from pathlib import Path

import pytest
from hypothesis import settings

# A machine that does other things may take any time for an example.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

RAY = Path(__file__).parent / "cluster"


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        starts_ray = RAY in item.path.parents or {"cluster", "address"} & set(getattr(item, "fixturenames", ()))
        group = "ray" if starts_ray else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    grouped = getattr(session.config.option, "loadgroup", False)  # in a process of pytest-xdist
    assert not grouped or all("@" in item.nodeid for item in session.items), "pytest-xdist does not see the groups"
