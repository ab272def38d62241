import pytest

from fluxmoe import plugins
from tests.plugins.rig import write


@pytest.fixture(scope="session")
def plugin_file(tmp_path_factory):
    """Write the three-line policy of the documentation to a file."""
    return write(tmp_path_factory.mktemp("plugin") / "mru.py")


@pytest.fixture(scope="session")
def registry(plugin_file):
    return plugins.load([plugin_file])
