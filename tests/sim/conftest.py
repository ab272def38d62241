import pytest

from fluxmoe import plugins

PLUGIN = """\
import fluxmoe

class MostRecentlyUsed(fluxmoe.EvictionPolicy):
    def score(self, view, pages):
        return -view.last_use[pages]

@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("mru", MostRecentlyUsed)
"""


@pytest.fixture(scope="session")
def plugin_file(tmp_path_factory):
    """The three-line policy of the documentation, as a file."""
    path = tmp_path_factory.mktemp("plugin") / "mru.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(scope="session")
def registry(plugin_file):
    return plugins.load([str(plugin_file)])
