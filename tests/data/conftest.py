"""A generated set that the tests of this folder read, and must not change."""

from pathlib import Path

import pytest

from upop.demo import Summary, write_shapes


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return write_shapes("nlvr", Path(tmp_path_factory.mktemp("shapes")) / "set", seed=7, size=600)
