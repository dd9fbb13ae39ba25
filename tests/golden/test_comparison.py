"""The comparison itself: what must hold holds, and what must fail fails."""

import json
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import comparison
from tests.golden.comparison import compare

NAN, INF = np.nan, np.inf


def entry(atol=0.0, rtol=0.0, **more):
    return {"atol": atol, "rtol": rtol, **more}


IN_WORDS = "a gradient|max abs diff <= 0.25 * max"


def floats(*values):
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("rule", "ours", "theirs"),
    [
        (entry(0.25), floats(1.25, -1.0), floats(1.0, -1.25)),
        (entry(0.25, 0.5), floats(3.25), floats(2.0)),
        (entry(0.25, 0.5), floats(-3.25), floats(-2.0)),
        (entry(0.25, scaled=True), floats(2.0, 8.0), floats(0.0, 8.0)),
        (entry(0.25, scaled=True), floats(0.25), floats(0.0)),
        (entry(0.25), floats(NAN, INF, -INF), floats(NAN, INF, -INF)),
        (entry(0.0, 0.5), floats(INF), floats(INF)),
        (entry(0.25, scaled=True), floats(INF, 1.25), floats(INF, 1.0)),
        (entry(0.0), floats(1.0, NAN), floats(1.0, NAN)),
        (entry(0.25), np.array([1.25], np.float64), floats(1.0)),
        (entry(0.25), jnp.asarray([1.25]), floats(1.0)),
        (entry(0.25), jnp.asarray([1.25], jnp.bfloat16), floats(1.0)),
        (entry(0.25), 1.25, np.float32(1.0).reshape(())),
        (entry(0.25), floats(), floats()),
        (entry(0.25, scaled=True), floats(), floats()),
        ({**entry(0.0), "meaning": IN_WORDS}, floats(0.5, 2.5), floats(0.0, 2.0)),
        (entry(), np.array([3], np.int32), np.array([3], np.int64)),
        (entry(1.0), np.array([254], np.uint8), np.array([255], np.uint8)),
        ({}, np.array([3]), np.array([3])),
        ({}, np.array([True]), np.array([True])),
        ({}, "a b", np.array("a b")),
        (entry(), np.array(["a", "bc"]), np.array(["a", "bc"])),
    ],
)
def test_these_hold(rule, ours, theirs):
    assert compare(rule, ours, theirs) is None


@pytest.mark.parametrize(
    ("rule", "ours", "theirs", "message"),
    [
        (entry(0.25), floats(1.2501), floats(1.0), r"1 of 1 wrong \(atol 0.25"),
        (entry(0.25, 0.5), floats(3.2501), floats(2.0), "rtol 0.5"),
        # The tolerance follows the expected value, not ours.
        (entry(0.0, 0.5), floats(2.0), floats(1.0), "difference 1"),
        (entry(0.25, scaled=True), floats(2.01, 8.0), floats(0.0, 8.0), r"at \(0,\): 2.01, expected 0.0"),
        (entry(0.25, scaled=True), floats(0.2501), floats(0.0), r"max\(1, 0\)"),
        (entry(0.25), floats(NAN), floats(0.0), "difference inf"),
        (entry(0.25), floats(0.0), floats(NAN), "difference inf"),
        (entry(0.25), floats(INF), floats(-INF), "difference inf"),
        (entry(0.25, 0.5), floats(1e30), floats(INF), "difference inf"),
        (entry(0.25, scaled=True), floats(INF), floats(1.0), "difference inf"),
        (entry(0.25, scaled=True), floats(INF, 2.0), floats(INF, 1.0), "1 of 2 wrong"),
        (entry(0.0), floats(1.0), np.nextafter(floats(1.0), floats(2.0)), "must be equal"),
        ({**entry(0.0), "meaning": IN_WORDS}, floats(0.51, 2.0), floats(0.0, 2.0), r"atol 0.5"),
        ({**entry(0.125), "meaning": IN_WORDS}, floats(0.5, 2.0), floats(0.0, 2.0), r"atol 0.125"),
        (entry(0.25), floats(1.0, 1.0), floats(1.0), r"shape \(2,\), expected \(1,\)"),
        (entry(0.25), floats(1.0).reshape(1, 1), floats(1.0), r"shape \(1, 1\)"),
        (entry(0.25), floats(), floats(1.0), r"shape \(0,\)"),
        (entry(1.0), np.array([1]), floats(1.0), r"integer \(int64\), expected float"),
        (entry(1.0), floats(1.0), np.array([1]), "float .*, expected integer"),
        (entry(), np.array([1]), np.array([True]), "integer .*, expected boolean"),
        (entry(), np.array([None]), np.array(["a"]), "dtype object .*, expected text"),
        (entry(1.0), np.array([253], np.uint8), np.array([255], np.uint8), "difference 2"),
        (entry(1.0), np.array([0], np.uint8), np.array([255], np.uint8), "difference 255"),
        (entry(), np.array([2**53]), np.array([2**53 + 1]), "must be equal"),
        (
            {},
            np.array([3, 5]),
            np.array([3, 4]),
            r"1 of 2 wrong \(must be equal\); worst at \(1,\): 5, expected 4",
        ),
        (entry(1.0), np.array([True]), np.array([False]), "must be equal"),
        ({}, np.array(["a"]), np.array(["b"]), "worst at .*: a, expected b"),
        ({}, floats(1.0), floats(1.0), "no tolerance for a float array"),
        ({"rtol": 0.5}, floats(1.0), floats(1.0), "no tolerance for a float array"),
    ],
)
def test_these_fail(rule, ours, theirs, message):
    line = compare(rule, ours, theirs)
    assert line is not None
    assert re.search(message, line)


ARRAYS = {
    "x": (floats(1, 2), {"role": "input"}),
    "hidden.0": (floats(2, 4), {"role": "output", "atol": 0.1, "rtol": 0.0}),
    "hidden.1": (floats(3, 6), {"role": "output", "atol": 0.1, "rtol": 0.0}),
    "ids": (np.array([1, 2]), {"role": "output", "atol": 0.0, "rtol": 0.0}),
}


def write(folder, arrays=None, **entries):
    arrays = ARRAYS if arrays is None else arrays
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cases.npz", **{name: array for name, (array, _) in arrays.items()})
    lines = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), **line} for name, (array, line) in arrays.items()
    }
    (folder / "golden.json").write_text(json.dumps({"system": "toy", "arrays": lines | entries}))
    return folder


def toy(change=None, **not_compared):
    """A system that returns the expected arrays, changed in one way."""

    def outputs(folder, inputs):
        assert set(inputs) == {"x"}
        x = inputs["x"]
        found = {"hidden.0": 2 * x, "hidden.1": 3 * x, "ids": np.array([1, 2])}
        if change is not None:
            change(found)
        return found

    return {"toy": types.SimpleNamespace(outputs=outputs, NOT_COMPARED=not_compared)}


def failures(folder, systems):
    return comparison.failures(comparison.read(folder), systems)


def test_a_system_that_returns_everything_holds(tmp_path):
    assert failures(write(tmp_path), toy()) == []
    plain = types.SimpleNamespace(outputs=toy()["toy"].outputs)
    assert failures(tmp_path, {"toy": plain}) == []


def test_every_wrong_array_is_listed(tmp_path):
    def change(found):
        found["hidden.0"] = found["hidden.0"] + 0.2
        found["ids"] = found["ids"][::-1]

    first, second = failures(write(tmp_path), toy(change))
    assert first.startswith("hidden.0: 2 of 2 wrong") and second.startswith("ids: 2 of 2 wrong")


def test_an_output_left_out_needs_a_reason(tmp_path):
    write(tmp_path)
    change = lambda found: found.pop("hidden.1")  # noqa: E731
    (line,) = failures(tmp_path, toy(change))
    assert line == "hidden.1: not returned, and no entry of NOT_COMPARED says why"
    assert failures(tmp_path, toy(change, **{r"hidden\.1": "the last layer is not kept"})) == []
    assert failures(tmp_path, toy(change, **{r"hidden": "a pattern is a whole name"})) == [line]
    assert failures(tmp_path, toy(change, **{r"hidden\.1": " "})) == [r"NOT_COMPARED['hidden\.1'] gives no reason"]


def test_an_excused_output_that_is_returned_fails(tmp_path):
    (line,) = failures(write(tmp_path), toy(**{"ids": "no reason to"}))
    assert line == "ids: returned, and yet excused by NOT_COMPARED['ids']; remove one"


def test_arrays_that_the_manifest_lacks_fail(tmp_path):
    lines = failures(write(tmp_path), toy(lambda found: found.update(more=np.zeros(1), x=np.zeros(1))))
    assert lines == ["more: returned, but unknown to the manifest", "x: returned, but an input"]


def test_a_folder_of_which_nothing_is_compared_fails(tmp_path):
    (line,) = failures(write(tmp_path), toy(dict.clear, **{".*": "later"}))
    assert line == "no output at all was compared"


def test_an_unknown_system_names_the_known_ones(tmp_path):
    (line,) = failures(write(tmp_path), {"b": None, "a": None})
    assert line == "no module is registered for the system 'toy'; registered: a, b"


def test_a_system_cannot_change_what_it_is_compared_with(tmp_path):
    golden = comparison.read(write(tmp_path))

    def outputs(folder, inputs):
        inputs.clear()
        return dict(golden.expected)

    assert comparison.failures(golden, {"toy": types.SimpleNamespace(outputs=outputs)}) == []
    assert set(golden.inputs) == {"x"}


def test_manifest_and_arrays_must_agree(tmp_path):
    arrays = dict(ARRAYS)
    arrays["hidden.0"] = (floats(2, 4), {"role": "output", "shape": [3]})
    arrays["hidden.1"] = (floats(2, 4), {"role": "output", "dtype": "float64"})
    arrays["ids"] = (np.array([1]), {"role": "outputs"})
    write(tmp_path, arrays, lost={"role": "output", "shape": [], "dtype": "float32"})
    content = json.loads((tmp_path / "golden.json").read_text())
    del content["arrays"]["x"]
    (tmp_path / "golden.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="disagree") as caught:
        comparison.read(tmp_path)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "lost",
        "x",
        "hidden.0",
        "hidden.1",
        "ids",
    ]


def test_folders_are_found_at_any_depth(tmp_path):
    write(tmp_path / "b")
    write(tmp_path / "a" / "c")
    (tmp_path / "empty").mkdir()
    assert comparison.find(tmp_path) == [tmp_path / "a" / "c", tmp_path / "b"]
    assert comparison.find(tmp_path / "b") == [tmp_path / "b"]
    for missing in ("empty", "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no folder with a golden\.json"):
            comparison.find(tmp_path / missing)
