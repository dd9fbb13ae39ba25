"""Parameters of a release and a release of parameters, whole and by blocks, against `import_params`."""

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints.test_rules import RULES, model, release
from vlm_jax.checkpoints.lazy import cast, lazy_params, lazy_release
from vlm_jax.checkpoints.params import import_params
from vlm_jax.checkpoints.plan import export_plan, plan


def by_path(tree):
    return {"/".join(part.key for part in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def middle(shape):
    return tuple(slice(size // 3, size) for size in shape)


@pytest.fixture
def params():
    return by_path(import_params(RULES, release(), model()))


def test_parameters_of_a_release(params):
    lazy = lazy_params(plan(RULES, release(), model()), release())
    assert lazy.keys() == params.keys()
    for path, expected in params.items():
        assert lazy[path].shape == expected.shape and lazy[path].dtype == expected.dtype
        np.testing.assert_array_equal(lazy[path][...], expected)
        block = middle(expected.shape)
        np.testing.assert_array_equal(lazy[path][block], expected[block], err_msg=path)


def test_a_release_of_parameters(params):
    steps = export_plan(RULES, {path: value.shape for path, value in params.items()})
    lazy = lazy_release(steps, params, {"stem.weight": np.float16})
    assert lazy.keys() == release().keys()
    for key, expected in release().items():
        expected = expected.astype(np.float16 if key == "stem.weight" else np.float32)
        assert lazy[key].dtype == expected.dtype
        np.testing.assert_array_equal(lazy[key][...], expected, err_msg=key)
        block = middle(expected.shape)
        np.testing.assert_array_equal(lazy[key][block], expected[block], err_msg=key)


def test_dtypes_are_kept_or_widened_or_asked_for():
    mixed = release()
    mixed["layers.0.fc.weight"] = mixed["layers.0.fc.weight"].astype(np.float16)
    mixed["layers.1.fc.weight"] = mixed["layers.1.fc.weight"].astype(ml_dtypes.bfloat16)
    mixed["stem.weight"] = mixed["stem.weight"].astype(ml_dtypes.bfloat16)
    steps = plan(RULES, mixed, model())
    assert lazy_params(steps, mixed)["blocks/mlp/kernel"].dtype == np.float32  # the smallest that holds both
    assert lazy_params(steps, mixed)["stem/kernel"].dtype == ml_dtypes.bfloat16
    asked = lazy_params(steps, mixed, dtype=np.float16)["stem/kernel"]
    assert asked.dtype == asked[...].dtype == np.float16
    tensor = lazy_params(steps, mixed)["stem/kernel"]
    assert cast(tensor, None).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(cast(tensor, np.float32)[...], tensor[...].astype(np.float32))
