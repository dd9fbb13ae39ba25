import math

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.checkpoints import placement
from vlm_jax.checkpoints.mismatch import CheckpointMismatch
from vlm_jax.checkpoints.ops import CONV2D, LINEAR, Chain, Concatenate, Each, Reshape, fused_linear
from vlm_jax.checkpoints.params import export_params, import_params
from vlm_jax.checkpoints.plan import plan
from vlm_jax.checkpoints.rules import Rule, prefixed

LAYERS, WIDTH, HIDDEN = 3, 4, 6

# A release in torch's layout: unrolled layers, a fused query, key and value, a stem outside the stack.
RULES = (
    Rule("stem.weight", "stem/kernel", CONV2D),
    Rule("layers.{layer}.norm.weight", "blocks/norm/scale"),
    Rule("layers.{layer}.fc.weight", "blocks/mlp/kernel", LINEAR),
    Rule(
        "layers.{layer}.qkv.weight",
        ("blocks/query/kernel", "blocks/key/kernel", "blocks/value/kernel"),
        fused_linear(4, 2, 2),
    ),
    Rule(("gate.weight", "up.weight"), "gate_up/kernel", Chain(Concatenate(0, (3, 2)), LINEAR)),
)


def release(dtype=np.float32):
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.normal(size=shape).astype(dtype)

    tensors = {
        "stem.weight": draw(WIDTH, 3, 2, 2),
        "gate.weight": draw(3, WIDTH),
        "up.weight": draw(2, WIDTH),
    }
    for layer in range(LAYERS):
        tensors[f"layers.{layer}.norm.weight"] = draw(WIDTH)
        tensors[f"layers.{layer}.fc.weight"] = draw(HIDDEN, WIDTH)
        tensors[f"layers.{layer}.qkv.weight"] = draw(8, WIDTH)
    return tensors


def spec(*shape, dtype=np.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def model(dtype=np.float32):
    return {
        "stem": {"kernel": spec(2, 2, 3, WIDTH, dtype=dtype)},
        "blocks": {
            "norm": {"scale": spec(LAYERS, WIDTH, dtype=dtype)},
            "mlp": {"kernel": spec(LAYERS, WIDTH, HIDDEN, dtype=dtype)},
            "query": {"kernel": spec(LAYERS, WIDTH, 4, dtype=dtype)},
            "key": {"kernel": spec(LAYERS, WIDTH, 2, dtype=dtype)},
            "value": {"kernel": spec(LAYERS, WIDTH, 2, dtype=dtype)},
        },
        "gate_up": {"kernel": spec(WIDTH, 5, dtype=dtype)},
    }


def problems_of(call, *args, **settings):
    with pytest.raises(CheckpointMismatch) as caught:
        call(*args, **settings)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


class Reads(dict):
    """A checkpoint that notes which blocks of which tensors are read, and how many elements at most."""

    def __init__(self, tensors):
        super().__init__({key: Tensor(key, value, self) for key, value in tensors.items()})
        self.log = []


class Tensor:
    def __init__(self, key, value, reads):
        self.key, self.value, self.reads = key, value, reads
        self.shape, self.dtype = value.shape, value.dtype

    def __getitem__(self, index):
        block = self.value[index]
        self.reads.log.append((self.key, block.shape))
        return block


def test_import_puts_every_tensor_in_its_place():
    tensors, params = release(), import_params(RULES, release(), model())
    np.testing.assert_array_equal(params["stem"]["kernel"], tensors["stem.weight"].transpose(2, 3, 1, 0))
    both = np.concatenate([tensors["gate.weight"], tensors["up.weight"]])
    np.testing.assert_array_equal(params["gate_up"]["kernel"], both.T)
    for layer in range(LAYERS):
        blocks = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        fused = tensors[f"layers.{layer}.qkv.weight"]
        np.testing.assert_array_equal(blocks["norm"]["scale"], tensors[f"layers.{layer}.norm.weight"])
        np.testing.assert_array_equal(blocks["mlp"]["kernel"], tensors[f"layers.{layer}.fc.weight"].T)
        np.testing.assert_array_equal(blocks["query"]["kernel"], fused[:4].T)
        np.testing.assert_array_equal(blocks["key"]["kernel"], fused[4:6].T)
        np.testing.assert_array_equal(blocks["value"]["kernel"], fused[6:].T)


def test_export_gives_the_release_back():
    tensors = release()
    exported = export_params(RULES, import_params(RULES, tensors, model()))
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(exported[key], tensor)
        assert exported[key].dtype == tensor.dtype


def test_import_casts_to_the_dtype_of_the_target_and_export_to_the_one_asked_for():
    tensors = release(ml_dtypes.bfloat16)
    params = import_params(RULES, tensors, model(np.float32))
    assert params["stem"]["kernel"].dtype == np.float32
    exported = export_params(RULES, params, dtype=ml_dtypes.bfloat16)
    for key, tensor in tensors.items():
        assert exported[key].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(exported[key], tensor)


def test_export_leaves_integers_alone():
    exported = export_params([Rule("ids", "ids")], {"ids": np.arange(300)}, dtype=ml_dtypes.bfloat16)
    np.testing.assert_array_equal(exported["ids"], np.arange(300))


def test_layers_that_are_not_stacked_keep_their_number():
    rules = [Rule("layers.{layer}.fc.weight", "block_{layer}/kernel", LINEAR)]
    tensors = {f"layers.{i}.fc.weight": np.full((2, 3), i, np.float32) for i in range(11)}
    params = import_params(rules, tensors, {f"block_{i}": {"kernel": spec(3, 2)} for i in range(11)})
    assert [int(params[f"block_{i}"]["kernel"][0, 0]) for i in range(11)] == list(range(11))
    exported = export_params(rules, params)
    assert {key: int(tensor[0, 0]) for key, tensor in exported.items()} == {
        f"layers.{i}.fc.weight": i for i in range(11)
    }


def test_a_release_that_is_stacked_already_goes_to_a_stack():
    rules = [Rule("encoderblock/query/kernel", "blocks/query", Each(Reshape((4, 2, 3), (4, 6))))]
    tensors = {"encoderblock/query/kernel": np.arange(5 * 24, dtype=np.float32).reshape(5, 4, 2, 3)}
    params = import_params(rules, tensors, {"blocks": {"query": spec(5, 4, 6)}})
    np.testing.assert_array_equal(params["blocks"]["query"].ravel(), np.arange(5 * 24))
    np.testing.assert_array_equal(
        export_params(rules, params)["encoderblock/query/kernel"], tensors["encoderblock/query/kernel"]
    )


def test_two_placeholders_stack_in_the_order_of_the_source_and_where_leaves_layers_out():
    dense = range(0, 2)
    rules = [
        Rule("layers.{layer}.mlp.weight", "dense/{layer}/kernel", where={"layer": dense}),
        Rule("layers.{layer}.experts.{expert}.weight", "experts/kernel", where={"layer": range(2, 5)}),
    ]
    tensors = {f"layers.{layer}.mlp.weight": np.full((1,), layer, np.int32) for layer in dense}
    tensors |= {
        f"layers.{layer}.experts.{expert}.weight": np.full((1,), 10 * layer + expert, np.int32)
        for layer in range(2, 5)
        for expert in range(2)
    }
    targets = {
        "dense": [{"kernel": spec(1, dtype=np.int32)} for _ in dense],
        "experts": {"kernel": spec(3, 2, 1, dtype=np.int32)},
    }
    params = import_params(rules, tensors, targets)
    assert params["experts"]["kernel"][..., 0].tolist() == [[20, 21], [30, 31], [40, 41]]
    assert [entry["kernel"].tolist() for entry in params["dense"]] == [[0], [1]]
    exported = export_params(rules, params)
    assert {key: int(tensor[0]) for key, tensor in exported.items()} == {
        key: int(tensor[0]) for key, tensor in tensors.items()
    }


def test_where_holds_for_placeholders_that_the_target_keeps():
    # The targets 2 and 3 exist, and belong to another rule.
    rules = [
        Rule("a.{layer}", "blocks/{layer}", where={"layer": range(2)}),
        Rule("b.{layer}", "blocks/{layer}", where={"layer": range(2, 4)}),
    ]
    tensors = {f"{'aabb'[i]}.{i}": np.full((1,), i, np.float32) for i in range(4)}
    params = import_params(rules, tensors, {"blocks": {str(i): spec(1) for i in range(4)}})
    assert [float(params["blocks"][str(i)][0]) for i in range(4)] == [0, 1, 2, 3]


def test_a_repeated_placeholder_is_one_number():
    rules = [Rule("x.{i}.{i}", "y_{i}_{i}")]
    problems = problems_of(plan, rules, {"x.1.2": np.zeros(1)}, {"y_1_1": spec(1), "y_1_2": spec(1)})
    assert [problem.split("; ")[0] for problem in problems] == [
        "not filled: y_1_2, shape (1,): no rule writes it",
        "missing from the checkpoint: x.1.1, shape (1,), for y_1_1",
        "unused: x.1.2, shape (1,): no rule reads it and no ignore pattern covers it",
    ]


def test_prefixed_tables_make_the_table_of_a_system():
    parts = ("a", "b")
    rules = [rule for part in parts for rule in prefixed(RULES, f"{part}_tower.model.", f"{part}/")]
    tensors = {f"{part}_tower.model.{key}": tensor for part in parts for key, tensor in release().items()}
    params = import_params(rules, tensors, {part: model() for part in parts})
    alone = import_params(RULES, release(), model())
    jax.tree.map(np.testing.assert_array_equal, params["b"], alone)
    exported = export_params(rules, params)
    assert exported.keys() == tensors.keys()


def test_boxes_of_axis_names_are_no_part_of_a_path():
    boxed = {"out": {"bias": nn.LogicallyPartitioned(spec(3), names=("embed",))}}
    params = import_params([Rule("bias", "out/bias")], {"bias": np.arange(3, dtype=np.float32)}, boxed)
    assert params["out"]["bias"].names == ("embed",)
    np.testing.assert_array_equal(params["out"]["bias"].value, np.arange(3))


def test_scalars_and_tuples_in_the_tree():
    params = import_params([Rule("t", "scale/0")], {"t": np.float32(2.5)}, {"scale": (spec(),)})
    assert params["scale"][0].shape == () and params["scale"][0] == 2.5
    assert export_params([Rule("t", "scale/0")], params)["t"] == 2.5


def sharded_model(mesh, **specs):
    def place(path, leaf):
        name = "/".join(part.key for part in path)
        return spec(*leaf.shape, sharding=NamedSharding(mesh, specs.get(name, PartitionSpec())))

    return jax.tree_util.tree_map_with_path(place, model())


@pytest.mark.parametrize("in_host_memory", [True, False])
def test_sharded_targets_get_their_blocks_on_their_devices(monkeypatch, in_host_memory):
    monkeypatch.setattr(placement, "_in_host_memory", lambda leaf: in_host_memory)
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("pipe", "tensor"))
    placed = {
        "blocks/mlp/kernel": PartitionSpec("pipe", None, "tensor"),
        "blocks/query/kernel": PartitionSpec(None, "tensor"),
        "stem/kernel": PartitionSpec(None, None, None, "tensor"),
        "gate_up/kernel": PartitionSpec("tensor"),
    }
    params = import_params(RULES, release(), sharded_model(mesh, **placed))
    jax.tree.map(np.testing.assert_array_equal, params, import_params(RULES, release(), model()))
    kernel = params["blocks"]["mlp"]["kernel"]
    assert kernel.sharding.spec == placed["blocks/mlp/kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, WIDTH, HIDDEN // 2)}


def test_only_the_blocks_that_devices_hold_are_read_and_replicas_once():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    targets = {"kernel": spec(2, 4, 6, sharding=NamedSharding(mesh, PartitionSpec(None, None, "tensor")))}
    rules = [Rule("layers.{layer}.weight", "kernel", LINEAR)]
    source = Reads({f"layers.{i}.weight": np.ones((6, 4), np.float32) for i in range(2)})
    import_params(rules, source, targets)
    assert sorted(source.log) == [(f"layers.{i}.weight", (3, 4)) for i in (0, 0, 1, 1)]


@pytest.mark.parametrize(
    "axes", [(None, "tensor"), (None, None, "tensor"), ("data", "tensor"), ("data", None, "tensor")]
)
def test_every_element_is_read_once_however_it_is_laid_out(axes):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    targets = {"kernel": spec(2, 4, 6, sharding=NamedSharding(mesh, PartitionSpec(*axes)))}
    rules = [Rule("layers.{layer}.weight", "kernel", LINEAR)]
    source = Reads({f"layers.{i}.weight": np.ones((6, 4), np.float32) for i in range(2)})
    import_params(rules, source, targets)
    assert sum(math.prod(shape) for _, shape in source.log) == 2 * 6 * 4


def test_parts_of_a_fused_tensor_are_read_together():
    source = Reads(release())
    import_params(RULES, source, model())
    assert [key for key, _ in source.log].count("layers.0.qkv.weight") == 1


def test_tensors_are_read_one_at_a_time():
    source = Reads(release())
    import_params(RULES, source, model())
    assert {shape for _, shape in source.log} == {tensor.shape for tensor in release().values()}


def test_nothing_is_read_before_everything_is_checked():
    source = Reads(release() | {"extra": np.zeros(1)})
    problems_of(import_params, RULES, source, model())
    assert source.log == []


def test_plan_says_what_goes_where():
    lines = [str(step) for step in plan(RULES, release(), model())]
    assert lines[1] == (
        "layers.0.norm.weight .. layers.2.norm.weight (3 stacked) (4,) -> Identity() -> blocks/norm/scale (3, 4)"
    )
    assert lines[0] == "stem.weight (4, 3, 2, 2) -> Transpose(axes=(2, 3, 1, 0)) -> stem/kernel (2, 2, 3, 4)"
    assert "gate.weight + up.weight (3, 4) + (2, 4) -> " in lines[4]


def test_all_problems_are_reported_at_once():
    tensors = release()
    tensors["layers.1.fc.wieght"] = tensors.pop("layers.1.fc.weight")
    tensors["stem.weight"] = tensors["stem.weight"][:, :, :1]
    tensors["layers.3.norm.weight"] = tensors["layers.2.norm.weight"]
    tensors["rotary.inv_freq"] = np.zeros(2, np.float32)
    targets = model()
    targets["stem"]["bias"] = spec(WIDTH)
    targets["blocks"]["norm"]["scal"] = targets["blocks"]["norm"].pop("scale")
    problems = problems_of(plan, RULES, tensors, targets)
    assert sorted(problems) == sorted(
        [
            "not filled: stem/bias, shape (4,): no rule writes it",
            "not filled: blocks/norm/scal, shape (3, 4): no rule writes it; "
            "similar target of a rule: blocks/norm/scale",
            "wrong shape: stem.weight: expected (4, 3, 2, 2), found (4, 3, 1, 2), for stem/kernel through "
            "Transpose(axes=(2, 3, 1, 0))",
            "missing from the checkpoint: layers.1.fc.weight, shape (6, 4), for blocks/mlp/kernel[1]; "
            "similar unused key: layers.1.fc.wieght",
            "unused: layers.1.fc.wieght, shape (6, 4): no rule reads it and no ignore pattern covers it; "
            "similar missing key: layers.1.fc.weight",
            "unused: rotary.inv_freq, shape (2,): no rule reads it and no ignore pattern covers it",
            *(
                f"unused: layers.{i}.norm.weight, shape (4,): the model has no blocks/norm/scale[layer {i}], "
                "and no ignore pattern covers the key"
                for i in range(4)
            ),
        ]
    )


def test_too_few_and_too_many_layers_are_named():
    tensors = release()
    targets = model()
    targets["blocks"]["norm"]["scale"] = spec(LAYERS + 1, WIDTH)
    targets["blocks"]["mlp"]["kernel"] = spec(LAYERS - 1, WIDTH, HIDDEN)
    assert problems_of(plan, RULES, tensors, targets) == (
        "missing from the checkpoint: layers.3.norm.weight, shape (4,), for blocks/norm/scale[3]",
        "unused: layers.2.fc.weight, shape (6, 4): the model has no blocks/mlp/kernel[layer 2], and no "
        "ignore pattern covers the key",
    )


def test_ignore_patterns_match_whole_keys():
    tensors = release() | {"head.weight": np.zeros(1), "head.weight.scale": np.zeros(1)}
    plan(RULES, tensors, model(), ignore=[r"head\..*"])
    (problem,) = problems_of(plan, RULES, tensors, model(), ignore=[r"head\.weight"])
    assert problem.startswith("unused: head.weight.scale")


def test_kept_targets_stay_as_they_were_and_their_tensors_count_as_read():
    tensors = release() | {"head.weight": np.zeros((1000, WIDTH), np.float32)}
    targets = model() | {"head": {"kernel": spec(WIDTH, 10)}, "connector": {"kernel": spec(WIDTH, 2)}}
    rules = (*RULES, Rule("head.weight", "head/kernel", LINEAR))
    params = import_params(rules, tensors, targets, keep=["head/.*", "connector/.*"])
    assert params["head"] == targets["head"] and params["connector"] == targets["connector"]
    assert params["stem"]["kernel"].shape == (2, 2, 3, WIDTH)
    assert len(plan(rules, tensors, targets, keep=["head/.*", "connector/.*"])) == len(RULES)
    (problem,) = problems_of(plan, rules, tensors, targets, keep=["connector/kernel"])
    assert problem.startswith("wrong shape: head.weight: expected (10, 4), found (1000, 4)")


def test_one_kept_target_of_several_stays_and_the_others_are_filled():
    params = import_params(RULES, release(), model(), keep=["blocks/key/kernel"])
    assert params["blocks"]["key"] == model()["blocks"]["key"]
    np.testing.assert_array_equal(params["blocks"]["value"]["kernel"][1], release()["layers.1.qkv.weight"][6:].T)


def test_a_target_with_two_writers_and_a_key_with_two_readers():
    rules = [Rule("a", "x"), Rule("b", "x")]
    (problem,) = problems_of(plan, rules, {"a": np.zeros(1), "b": np.zeros(1)}, {"x": spec(1)})
    assert problem == "written twice: x, by Rule(a -> x) and by Rule(b -> x)"
    rules = [Rule("a", "x"), Rule("a", "y")]
    (problem,) = problems_of(plan, rules, {"a": np.zeros(1)}, {"x": spec(1), "y": spec(1)})
    assert problem.startswith("read twice: a, by Rule(a -> x) and by Rule(a -> y)")
    (problem,) = problems_of(export_params, rules, {"x": np.zeros(1), "y": np.zeros(1)})
    assert problem == "written twice: a, by Rule(a -> x) and by Rule(a -> y)"


def test_a_rule_whose_targets_are_not_all_in_the_model():
    rules = [Rule("qkv", ("q", "k"), fused_linear(2, 2))]
    problems = problems_of(plan, rules, {"qkv": np.zeros((4, 3), np.float32)}, {"q": spec(3, 2)})
    assert problems[0] == "not in the model: k, which Rule(qkv -> q + k) fills together with others"


def test_rules_for_parts_that_neither_side_has_are_harmless():
    params = import_params((*RULES, Rule("out.bias", "out/bias")), release(), model())
    assert "out" not in params


@pytest.mark.parametrize(
    ("rule", "targets", "message"),
    [
        (Rule("w", "x", LINEAR), {"x": spec(3)}, r"Rule\(w -> x\) cannot return this shape: .* expected 2 axes"),
        (Rule("l.{i}.{j}", "x"), {"x": spec(3)}, r"x \(3,\): Rule\(.*\) stacks i, j on the leading axes"),
        (
            Rule("l.{i}", ("x", "y"), fused_linear(2, 2)),
            {"x": spec(3, 4, 2), "y": spec(2, 4, 2)},
            "stacks i on the leading axes",
        ),
        (Rule("l.{i}", "x", where={"i": range(1, 3)}), {"x": spec(3, 4)}, "stacks 2 values of i, not 3"),
        (Rule(("v", "w"), "x", LINEAR), {"x": spec(3, 4)}, "names 2 sources, but .* takes 1"),
    ],
)
def test_rules_that_cannot_give_the_shape_of_a_target(rule, targets, message):
    with pytest.raises(CheckpointMismatch, match=message):
        plan([rule], {}, targets)


def test_integers_do_not_become_floats():
    with pytest.raises(CheckpointMismatch, match="wrong dtype: w is int32, and x is float32"):
        plan([Rule("w", "x")], {"w": np.zeros(2, np.int32)}, {"x": spec(2)})


def test_export_names_every_parameter_without_a_rule_or_of_another_shape():
    params = import_params(RULES, release(), model())
    params["stem"]["bias"] = np.zeros(WIDTH, np.float32)
    params["blocks"]["key"]["kernel"] = params["blocks"]["key"]["kernel"][..., :1]
    problems = problems_of(export_params, RULES, params)
    assert len(problems) == 2
    assert problems[0].startswith("wrong shape: blocks/query/kernel (3, 4, 4) + blocks/key/kernel (3, 4, 1)")
    assert problems[1].startswith("not filled: stem/bias")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("a.{i}", "x/{j}"), r"target names \['j'\], which the source does not"),
        (lambda: Rule(("a.{i}", "b"), "x"), "must name the same placeholders"),
        (lambda: Rule("a.{i}", ("x/{i}", "y")), "must name the same placeholders"),
        (lambda: Rule("a.{i}", "x", where={"layer": range(2)}), r"restricts \['layer'\]"),
    ],
)
def test_rules_that_cannot_be_meant(make, message):
    with pytest.raises(ValueError, match=message):
        make()
