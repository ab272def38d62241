"""Broken plugins affect only users who request them; these users get the reason."""

from __future__ import annotations

import json
import logging
import signal

import pytest

import fluxmoe
from fluxmoe import plugins
from fluxmoe.cli import main
from fluxmoe.config import parse
from fluxmoe.core.policy.watchdog import Limits
from fluxmoe.errors import PluginLoadError, UnknownPolicyError
from fluxmoe.plugins import checks, loading
from tests.plugins.rig import MRU, install, write
from tests.web import served

HOOK = "import fluxmoe, sys\n@fluxmoe.hookimpl\ndef fluxmoe_register_policies(register):\n"
HALF = MRU + '    register("lru", MostRecentlyUsed)\n'

#: Fault → source of the plugin, and text in the message.
BROKEN = {
    "missing import": ("import saddle", "ModuleNotFoundError: No module named 'saddle'"),
    "syntax": ("def broken(:", "SyntaxError"),
    "exit at import": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "raises at import": ("raise RuntimeError('no GPU here')", "RuntimeError: no GPU here"),
    "fluxmoe's own error": (
        "import fluxmoe\nraise fluxmoe.FluxMoEError('no torch')",
        "no torch",
    ),
    "unprintable error": (
        "class Odd(BaseException):\n    def __str__(self): 1 / 0\nraise Odd",
        "cannot import",
    ),
    "endless import": ("while True: pass", "TimeoutError: it took more than 0.2 s"),
    "no hook": ("x = 1", "no hook was found"),
    "unknown hook": (
        "import fluxmoe\n@fluxmoe.hookimpl\ndef fluxmoe_register_polices(register): pass",
        "unknown hook 'fluxmoe_register_polices'",
    ),
    "wrong signature": (HOOK.replace("(register)", "(registry)") + "    pass", "registry"),
    "raises in the hook": (HOOK + "    1 / 0", "raised ZeroDivisionError"),
    "exits in the hook": (HOOK + "    sys.exit()", "raised SystemExit"),
    "endless hook": (HOOK + "    while True: pass", "raised TimeoutError"),
    "not a policy": (HOOK + "    register('x', int)", "'x' is not a policy class"),
    "clash with a built-in": (HALF, "policy 'lru' is already registered by fluxmoe"),
    "twice the same name": (MRU + '    register("NAME", MostRecentlyUsed)', "already registered"),
    "newer api": (
        "fluxmoe_plugin_api = 99\n" + MRU,
        "plugin API 99; this version of FluxMoE has 1",
    ),
    "no api": ("fluxmoe_plugin_api = '1.0'\n" + MRU, "fluxmoe_plugin_api is '1.0'"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(checks, "LIMITS", Limits(hard_s=0.2))
    loading._warn.cache_clear()


@pytest.fixture
def pony(site, monkeypatch):
    """Install a plugin whose module the test writes, next to a working plugin."""
    write(site / "cart_policy.py", name="cart")
    install(site, "fluxmoe-cart", {"cart": "cart_policy"})
    install(site, "fluxmoe-pony", {"pony": "pony_policy"})
    monkeypatch.delenv("FLUXMOE_PLUGINS")
    return site / "pony_policy.py"


@pytest.mark.parametrize("case", BROKEN)
def test_an_installed_plugin_that_is_broken_is_reported_and_left_out(pony, caplog, case):
    source, message = BROKEN[case]
    write(pony, source, name="mine")
    for _ in range(2):
        registry = plugins.load()
    assert registry.names("eviction") == sorted([*plugins_built_in(), "cart"])
    assert {r.plugin for r in registry} == {"fluxmoe", "cart"}
    found = {p.name: p for p in registry.plugins}
    assert (found["pony"].origin, found["pony"].version, found["pony"].status) == (
        *("installed", "1.0", "broken"),
    )
    assert message in found["pony"].problem
    assert (found["cart"].status, found["cart"].version) == ("ok", "1.0")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1, warnings  # once per process
    assert warnings[0].startswith("plugin pony 1.0 is broken and left out: ")
    # A server that does not use the plugin starts; the error for an unknown name includes the
    # reason.
    wanted = {"model": "m", "memory": {"budget": "1GiB"}, "eviction": "cart"}
    registry.policies(parse(wanted, where="test"))
    with pytest.raises(UnknownPolicyError) as info:
        registry.create("eviction", "mine")
    assert "the installed plugin pony is broken: " in info.value.fix
    assert message in info.value.fix


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_is_named_must_work(site, case):
    source, message = BROKEN[case]
    path = write(site / "pony.py", source, name="mine")
    for name in (path, "pony"):
        with pytest.raises(PluginLoadError) as info:
            plugins.load([name])
        assert message.replace("import: ", "import it: ") in info.value.what
        assert info.value.where == f"plugin {name}"


def plugins_built_in():
    return [r.name for r in plugins.load() if (r.kind, r.plugin) == ("eviction", "fluxmoe")]


def test_nothing_of_a_plugin_that_fails_half_way_is_kept():
    class Half:
        @fluxmoe.hookimpl
        def fluxmoe_register_policies(self, register):
            register("half", fluxmoe.policies.eviction.lru.LeastRecentlyUsed)
            raise OSError("gone")

    registry, half = plugins.load(), Half()
    for _ in range(2):  # a failed plugin may be added again
        with pytest.raises(PluginLoadError, match="OSError: gone"):
            registry.add(half, "half")
        assert "half" not in registry.names("eviction")
        assert not registry.knows(half)


def test_ctrl_c_and_what_a_signal_handler_raises_get_through(site):
    write(site / "pony.py", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plugins.load(["pony"])

    def handler(number, frame):
        raise SystemExit("asked to stop")

    write(site / "cart.py", "import signal\nsignal.raise_signal(signal.SIGUSR1)")
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(SystemExit, match="asked to stop"):
            plugins.load(["cart"])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_installed_plugin_may_be_named_as_well(pony):
    write(pony, name="mine")
    registry = plugins.load(["pony_policy"])
    assert registry.get("eviction", "mine").plugin == "pony"


def test_an_installed_plugin_that_is_named_must_work(pony):
    write(pony, "import saddle")
    with pytest.raises(PluginLoadError, match="saddle"):
        plugins.load(["pony_policy"])


def test_two_distributions_with_an_entry_point_of_one_name(pony, site):
    write(pony, name="mine")
    write(site / "other.py", name="other")
    install(site, "fluxmoe-other", {"pony": "other"})
    registry = plugins.load()
    status = sorted(p.status for p in registry.plugins if p.name == "pony")
    assert status == ["broken", "ok"]


def test_what_the_allow_list_leaves_out_is_shown(pony, monkeypatch):
    write(pony, "raise SystemError('I ran')")
    monkeypatch.setenv("FLUXMOE_PLUGINS", "cart")
    [left_out] = [p for p in plugins.load().plugins if p.status != "ok"]
    assert (left_out.name, left_out.status) == ("pony", "left out")
    assert "FLUXMOE_PLUGINS" in left_out.problem


# --- policies that cannot be created --------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    def __init__(self): raise OSError('no table')", "OSError: no table"),
        ("    def __init__(self): raise SystemExit(1)", "SystemExit: 1"),
        ("    def __init__(self):\n        while True: pass", "TimeoutError"),
        ("    stable_score = 'yes'", "stable_score is 'yes', not bool"),
        ("    @property\n    def needs_future(self): 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_policy_that_cannot_be_made_is_refused_before_anything_starts(tmp_path, body, message):
    source = MRU.replace("    def score", f"{body}\n    def score")
    registry = plugins.load([write(tmp_path / "p.py", source, name="mine")])
    with pytest.raises(PluginLoadError, match="eviction policy 'mine' cannot be created: ") as info:
        registry.create("eviction", "mine")
    assert message in info.value.what


@pytest.mark.parametrize("lead", ["'1'", "1.0", "True", "None"])
def test_lead_must_be_a_number_of_layers(tmp_path, lead):
    source = f"""
    import fluxmoe
    class Fetch(fluxmoe.PrefetchPolicy):
        lead = {lead}
        def propose(self, view, access): return []
    @fluxmoe.hookimpl
    def fluxmoe_register_policies(register): register("fetch", Fetch)
    """
    registry = plugins.load([write(tmp_path / "p.py", source)])
    with pytest.raises(PluginLoadError, match=r"lead is .*, not int"):
        registry.create("prefetch", "fetch")


def test_attributes_of_a_prefetch_policy(tmp_path):
    source = """
    import fluxmoe
    class Fetch(fluxmoe.PrefetchPolicy):
        waste = WASTE
        predictions = PREDICTIONS
        def propose(self, view, access): return []
    @fluxmoe.hookimpl
    def fluxmoe_register_policies(register): register("fetch", Fetch)
    """
    cases = [("1", "True", ""), ("0.5", "0", "predictions is 0"), ("'x'", "True", "waste is 'x'")]
    for number, (waste, predictions, message) in enumerate(cases):
        text = source.replace("WASTE", waste).replace("PREDICTIONS", predictions)
        registry = plugins.load([write(tmp_path / f"p{number}.py", text)])
        if not message:
            assert registry.create("prefetch", "fetch").waste == 1
            continue
        with pytest.raises(PluginLoadError, match=message):
            registry.create("prefetch", "fetch")


# --- the plugin API's version ---------------------------------------------------------------------


class Declares:
    def __init__(self, version):
        self.fluxmoe_plugin_api = version


def test_the_present_api_is_one():
    assert fluxmoe.PLUGIN_API == 1
    checks.check_api(object(), "silent")
    checks.check_api(Declares(1), "says so")


def test_an_older_api_works_for_a_while_with_a_warning(caplog):
    for _ in range(2):
        checks.check_api(Declares(2), "pony", current=3, oldest=2)
    [record] = caplog.records
    assert "plugin pony was written for plugin API 2; 3 is current" in record.getMessage()


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (4, "plugin API 4; this version of FluxMoE has 3; plugin pony; upgrade fluxmoe"),
        (1, "plugin API 1; the oldest supported is 2; plugin pony; use a newer version"),
        (0, "fluxmoe_plugin_api is 0"),
        (True, "fluxmoe_plugin_api is True"),
        ("2", "fluxmoe_plugin_api is '2'"),
    ],
)
def test_other_apis_are_refused(declared, message):
    with pytest.raises(PluginLoadError) as info:
        checks.check_api(Declares(declared), "pony", current=3, oldest=2)
    assert message in str(info.value)


# --- fluxmoe policies -----------------------------------------------------------------------------


def listed(capsys, *arguments):
    main_to_end("policies", "--json", *arguments)
    return json.loads(capsys.readouterr().out)


def main_to_end(*arguments):
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code in (0, None)


def test_policies_shows_origin_version_and_status(pony, tmp_path, capsys, monkeypatch):
    write(pony, "import saddle")
    mine = write(tmp_path / "mine.py", '__version__ = "0.3"\n' + MRU, name="mine")
    rows = listed(capsys, "--plugin", mine)
    by_name = {row["name"]: row for row in rows}
    assert [by_name["lru"][k] for k in ("plugin", "origin", "version", "status")] == [
        *("fluxmoe", "built in", fluxmoe.__version__, "ok"),
    ]
    assert [by_name["cart"][k] for k in ("plugin", "origin", "version", "status")] == [
        *("cart", "installed", "1.0", "ok"),
    ]
    assert [by_name["mine"][k] for k in ("plugin", "origin", "version", "faults")] == [
        *(mine, "named", "0.3", None),
    ]
    broken = by_name[None]
    assert (broken["plugin"], broken["status"], broken["kind"]) == ("pony", "broken", None)
    assert "No module named 'saddle'" in broken["problem"]
    main_to_end("policies")
    shown = capsys.readouterr().out
    assert "broken" in shown
    assert "No module named 'saddle'" in shown
    monkeypatch.setenv("FLUXMOE_PLUGINS", "cart")
    assert {row["status"] for row in listed(capsys)} == {"ok", "left out"}


METRICS = """# HELP fluxmoe_policy_faults_total Faults of policies that were contained.
# TYPE fluxmoe_policy_faults_total counter
fluxmoe_policy_faults_total{kind="eviction",policy="lru"} 3.0
fluxmoe_policy_faults_total{kind="eviction",policy="mru"} 16.0
fluxmoe_policy_faults_total{kind="arbitration",policy="marginal"} 1.0e+01
fluxmoe_policy_faults_created{kind="eviction",policy="lru"} 1.7e+09
# TYPE fluxmoe_policy_replaced gauge
fluxmoe_policy_replaced{kind="eviction",policy="mru",reason="score raised ValueError: no idea"} 2.0
# TYPE fluxmoe_budget_bytes gauge
fluxmoe_budget_bytes 4096.0
"""


@pytest.fixture
def server():
    """Run a server that answers with ``answers[path]``."""
    answers: dict[str, str] = {}

    def answer(request):
        found = answers.get(request.path)
        return (404 if found is None else 200), (found or "").encode()

    with served(answer) as url:
        yield url, answers


def test_c3_policies_tells_what_became_of_a_running_servers(server, capsys):
    url, answers = server
    answers["/metrics"] = METRICS
    rows = {(r["kind"], r["name"]): r for r in listed(capsys, "--server", url + "/")}
    lru, mru = rows["eviction", "lru"], rows["eviction", "mru"]
    assert (lru["status"], lru["problem"], lru["faults"]) == ("ok", "", 3)
    assert rows["arbitration", "marginal"]["faults"] == 10
    assert rows["eviction", "lfu"]["faults"] is None  # the server does not run this policy
    # This policy is from a plugin that is not installed here.
    assert (mru["status"], mru["faults"]) == ("replaced", 16)
    assert mru["problem"] == "score raised ValueError: no idea"
    answers["/metrics"] = METRICS.replace('policy="mru"', 'policy="lfu"')
    (lfu,) = (r for r in listed(capsys, "--server", url) if r["name"] == "lfu")
    assert (lfu["status"], lfu["plugin"]) == ("replaced", rows["eviction", "lfu"]["plugin"])
    main_to_end("policies", "--server", url)
    shown = capsys.readouterr().out
    assert "faults" in shown and "replaced" in shown and "no idea" in shown


@pytest.mark.parametrize("text", [None, "vllm:num_requests_running 0.0\n"])
def test_a_server_that_tells_nothing(server, capsys, text):
    url, answers = server
    if text is not None:
        answers["/metrics"] = text
    with pytest.raises(SystemExit) as info:
        main(["policies", "--server", url])
    assert info.value.code == 2
    assert "error[FM405]" in capsys.readouterr().err
