"""Kinds of packages outside of vlm_jax, which are made here as folders with the metadata that pip would install."""

import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import vlm_jax
from vlm_jax import plugins, testing
from vlm_jax.config import ConfigError, choose
from vlm_jax.connectors import CONNECTORS, PACKED_CONNECTORS
from vlm_jax.connectors.connector import Connector
from vlm_jax.connectors.pool import Pool
from vlm_jax.layers.dense import with_axes
from vlm_jax.plugins import PluginError, Plugins, Registry, lacking_of_class
from vlm_jax.pretrained import FAMILIES, vit
from vlm_jax.pretrained.processing import IMAGE_TEXT_PROCESSORS, PROCESSORS, image_text, llava_hf
from vlm_jax.reducers import REDUCERS
from vlm_jax.reducers.uniform_stride import UniformStride
from vlm_jax.testing import connectors, families, kinds, reducers

from .advice import tried

TABLES = (CONNECTORS, PACKED_CONNECTORS, REDUCERS, FAMILIES, PROCESSORS, IMAGE_TEXT_PROCESSORS)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes a package with an entry point, which is then loaded anew; all is undone after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    for table in TABLES:
        monkeypatch.setattr(table, "_added", {})
        monkeypatch.setattr(table, "_sources", {})
    before = set(sys.modules)

    def write(name, code, point=":register"):
        (tmp_path / f"{name}.py").write_text("import vlm_jax\n" + code)
        metadata = tmp_path / f"{name}-0.3.dist-info"
        metadata.mkdir(exist_ok=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n")
        (metadata / "entry_points.txt").write_text(f"[vlm_jax.plugins]\nkinds = {name}{point}\n")
        for module in (name, "counted"):
            sys.modules.pop(module, None)
        monkeypatch.setattr(plugins, "PLUGINS", Plugins())

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("theirs"):
            del sys.modules[name]


def connector(name, base="Pool", kind="median"):
    """Code of a package that registers a connector."""
    return (
        "from vlm_jax.connectors.pool import Pool\n"
        f"class Theirs({base}):\n    kind = '{kind}'\n"
        f"def register():\n    vlm_jax.register_connector('{name}', Theirs)\n"
    )


def test_plugins_are_loaded_once_and_only_when_a_table_is_listed_or_lacks_the_kind(install, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "theirs_calls", types.SimpleNamespace(calls=calls))
    install("theirs_one", connector("median") + "    import theirs_calls; theirs_calls.calls.append(0)\n")
    assert CONNECTORS["pool"] is Pool and "mlp" in CONNECTORS and REDUCERS["none"] is None
    assert calls == [] and "theirs_one" not in sys.modules
    assert choose(CONNECTORS, "median", "config.connector.kind") is sys.modules["theirs_one"].Theirs
    assert (*CONNECTORS,) == (*CONNECTORS.own, "median") and len(CONNECTORS) == len(CONNECTORS.own) + 1
    assert {**CONNECTORS}["median"] is CONNECTORS["median"] and "median" not in PACKED_CONNECTORS
    with pytest.raises(ConfigError, match="no kind 'medien'; did you mean 'median'"):
        choose(CONNECTORS, "medien", "config.connector.kind")
    assert calls == [0]
    assert CONNECTORS.kinds_of("theirs_one") == ["median"] and REDUCERS.kinds_of("theirs_one") == []
    assert CONNECTORS.kinds_of("vlm_jax")[0] == "mlp"


def test_a_plugin_sees_the_kinds_while_it_is_loaded(install):
    code = connector("median") + "    assert 'median' in {**vlm_jax.connectors.CONNECTORS}\n"
    install("theirs_two", code)
    assert "median" in CONNECTORS


def test_a_second_thread_waits_for_the_plugins(install, monkeypatch):
    started, go, found = threading.Event(), threading.Event(), []
    monkeypatch.setitem(sys.modules, "theirs_events", types.SimpleNamespace(started=started, go=go))
    install(
        "theirs_three", "import theirs_events as e\n" + connector("median") + "    e.started.set(); e.go.wait(60)\n"
    )
    threads = [threading.Thread(target=lambda: found.append("later" in CONNECTORS)) for _ in range(2)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    go.set()
    for thread in threads:
        thread.join()
    assert found == [False, False] and "median" in CONNECTORS


def test_a_broken_package_leaves_the_kinds_of_others_as_they_are(install):
    install("theirs_whole", connector("median"))
    install("theirs_broken", "import no_such_module\n")
    assert CONNECTORS["median"].kind == "median" and "mlp" in CONNECTORS
    with pytest.raises(PluginError, match="theirs_broken"):
        "medium" in CONNECTORS  # noqa: B015


def test_every_broken_entry_point_is_named_with_its_package(install):
    install("theirs_four", "import no_such_module\n")
    install("theirs_five", "def register():\n    raise ZeroDivisionError('by zero')\n")
    install("theirs_six", "register = 3\n")
    for _ in range(2):  # a second lookup says the same
        with pytest.raises(PluginError) as raised:
            list(CONNECTORS)
        assert str(raised.value).splitlines() == [
            "theirs_five 0.3, entry point 'kinds = theirs_five:register': ZeroDivisionError: by zero; repair or "
            "uninstall the package",
            "theirs_four 0.3, entry point 'kinds = theirs_four:register': ModuleNotFoundError: No module named "
            "'no_such_module'; repair or uninstall the package",
            "theirs_six 0.3, entry point 'kinds = theirs_six:register': expected a function that registers kinds, got "
            "3; name it as 'module:function'",
        ]
    assert CONNECTORS["pool"] is Pool  # which needs none of them


def test_a_repaired_package_is_loaded(install):
    install("theirs_seven", "import no_such_module\n")
    with pytest.raises(PluginError, match=tried("{}: {}; repair or uninstall the package")):
        list(CONNECTORS)
    install("theirs_seven", connector("median") + "number = 3\n", ":number")
    with pytest.raises(PluginError, match=tried("got {}; name it as 'module:function'")):
        list(CONNECTORS)
    install("theirs_seven", connector("median"))
    assert "median" in CONNECTORS


def test_a_taken_name_is_refused_with_who_has_it(install):
    install("theirs_eight", connector("pool", kind="pool"))
    message = r"^theirs_eight 0.3, entry point 'kinds = theirs_eight:register': register_connector: 'pool' is taken by "
    with pytest.raises(PluginError, match=message + r"vlm_jax.connectors.pool.Pool of vlm_jax; choose another name$"):
        list(CONNECTORS)
    install("theirs_eight", connector("median"))
    assert "median" in CONNECTORS
    with pytest.raises(PluginError, match=tried("{}: '{}' is taken by {} of {}; choose another name")) as raised:
        vlm_jax.register_connector("median", type("Ours", (Pool,), {"kind": "median"}))
    assert "is taken by theirs_eight.Theirs of theirs_eight 0.3, entry point 'kinds" in str(raised.value)
    vlm_jax.register_connector("middle", type("Ours", (Pool,), {"kind": "middle"}))
    vlm_jax.register_connector("middle", again := type("Ours", (Pool,), {"kind": "middle"}))  # a cell run again
    assert CONNECTORS["middle"] is again
    with pytest.raises(PluginError, match="expected a name"):
        vlm_jax.register_connector("", Pool)


def test_what_a_class_lacks_is_listed_before_it_is_in_the_table(install):
    class Half(nn.Module):
        features: int
        kind = "whole"

        def for_budget(self, budget, grid):
            return {}

        def num_tokens(self):
            return 1

    with pytest.raises(PluginError) as raised:
        vlm_jax.register_connector("half", Half)
    assert str(raised.value).endswith(
        ".Half, lacks dtype; param_dtype; token_grid(grid); __call__(features, *, deterministic); kind = 'half', has "
        "'whole'; for_budget(budget, grid), takes (self, budget, grid); num_tokens(grid), takes (self); add what is "
        "missing"
    )
    assert "half" not in CONNECTORS
    with pytest.raises(PluginError, match=r"lacks the base class flax\.linen\.Module"):
        vlm_jax.register_reducer("half", object)
    with pytest.raises(PluginError, match=r"lacks reduces_in; .*for_budget\(budget, grid, num_layers\), takes"):
        vlm_jax.register_reducer("pool", Pool)


def test_with_what_is_missing_a_class_is_registered(install):
    table = Registry("register_connector", {}, lacking_of_class(Connector))
    with pytest.raises(PluginError, match=tried("lacks {}; add what is missing")):
        table.register("half", type("Half", (Pool,), {"kind": "half", "token_grid": lambda self: None}))
    table.register("half", type("Half", (Pool,), {"kind": "half"}))


def test_each_function_adds_to_its_tables(install):
    vlm_jax.register_connector("packed", type("Packed", (Pool,), {"kind": "packed"}), packed=True)
    vlm_jax.register_reducer("even", type("Even", (UniformStride,), {"kind": "even"}))
    vlm_jax.register_family("their_vit", vit.describe, image_text_processor=image_text.vit)
    vlm_jax.register_family("their_llava", vit.describe, processor=llava_hf.processor)
    assert "packed" in CONNECTORS and "packed" in PACKED_CONNECTORS and "even" in REDUCERS
    assert FAMILIES["their_vit"] is vit.describe and IMAGE_TEXT_PROCESSORS["their_vit"] is image_text.vit
    assert PROCESSORS["their_llava"] is llava_hf.processor and "their_vit" not in PROCESSORS
    with pytest.raises(PluginError, match=r"lacks the arguments \(config, checkpoint, \*, dtype, param_dtype\)"):
        vlm_jax.register_family("wrong", lambda config: config)
    with pytest.raises(PluginError, match=r"lacks the arguments \(folder, config\)"):
        vlm_jax.register_family("wrong", vit.describe, processor=lambda folder: folder)


def test_contract_tests_need_the_name_of_an_installed_package(install, monkeypatch, pytestconfig):
    monkeypatch.setattr(kinds, "_package", "vlm_jax")
    monkeypatch.setenv("XLA_FLAGS", "")

    def configure(package):
        with monkeypatch.context() as patch:
            patch.setattr(pytestconfig, "getini", {"vlm_jax_package": package}.get)
            testing.pytest_configure(pytestconfig)

    with pytest.raises(pytest.UsageError, match=tried("in the settings of pytest; set it to the package's name")):
        configure("")
    assert kinds.under_test(CONNECTORS, "register_connector") == [*CONNECTORS.own]
    configure("Theirs-Nine")
    install("theirs_nine", "def register():\n    pass\n")
    with pytest.raises(PluginError, match=tried("install it (pip install -e .), or remove the import of these tests")):
        kinds.under_test(CONNECTORS, "register_connector")
    install("theirs_nine", connector("median"))
    assert kinds.under_test(CONNECTORS, "register_connector") == ["median"]


def test_a_parameter_without_axes_is_named():
    made = {"kernel": jnp.zeros((2, 3))}
    with pytest.raises(AssertionError, match=tried("{} has no names; make it with layers.dense.with_axes")):
        kinds.check_names(made, 1)
    kinds.check_names({"kernel": with_axes(nn.initializers.zeros, "embed", "mlp")(jax.random.key(0), (2, 3))}, 1)
    with pytest.raises(AssertionError, match="are no names of vlm_jax/axes"):
        kinds.check_names({"kernel": with_axes(nn.initializers.zeros, "embed", "x")(jax.random.key(0), (2, 3))}, 1)


def test_tables_have_tests_of_different_names():
    """A package imports the tests of several tables into one file, where a name that is there twice would be lost."""
    named = [name for part in (connectors, families, reducers) for name in vars(part) if name.startswith("test_")]
    assert len(named) == len(set(named)) == 25
