"""Names that have moved from ``fluxmoe.sim`` are still available there, with a warning."""

import importlib

import pytest

MOVED = {
    "fluxmoe.sim.trace": (
        "fluxmoe.trace",
        "OPTIONAL Rows StepRows TraceMeta TraceReader TraceWriter",
    ),
    "fluxmoe.sim.shipped": ("fluxmoe.trace.shipped", "FOLDER NAMES path"),
    "fluxmoe.sim.synth": ("fluxmoe.trace.synth", "Workload"),
}


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_name_is_the_same_object_and_warns(old):
    new, names = MOVED[old]
    before, now = importlib.import_module(old), importlib.import_module(new)
    for name in names.split():
        with pytest.warns(DeprecationWarning, match=f"{old}.{name} .*, use {new}.{name}$") as told:
            assert getattr(before, name) is getattr(now, name)
        assert told[0].filename == __file__


@pytest.mark.parametrize("old", MOVED)
def test_other_names_are_missing_as_in_any_module(old):
    module = importlib.import_module(old)
    assert not hasattr(module, "no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec(f"from {old} import no_such_name")
