"""Rules on weights in every executor, and from the command line."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import tadrop_jax as tj
from tests import helpers
from tests.rules.mergekit_peer import assert_close, ours


@pytest.mark.parametrize(("rule", "tasks"), [(tj.slerp(0.3), 1), (tj.arcee_fusion(), 1), (tj.model_stock(), 3)])
def test_sharded(rule, tasks):
    """Where tensors are spread over devices; what wants rows gathers one tensor."""
    rng = np.random.default_rng(0)
    base, *models = ({"w": rng.normal(size=(16, 6)).astype(np.float32)} for _ in range(tasks + 1))
    mesh = jax.make_mesh((4,), ("x",))
    to = NamedSharding(mesh, PartitionSpec("x"))
    spread = [jax.device_put(tree, to) for tree in (base, *models)]
    merged = tj.merge(spread[0], spread[1:], rule)["w"]
    assert merged.sharding.is_equivalent_to(to, 2)
    assert_close({"w": merged}, ours(base, models, rule))


def test_command_line(tmp_path, capsys):
    base, models = helpers.save_family(tmp_path, 2)
    assert helpers.merge(tmp_path, "--set", "t=0.3", "--quiet", method="slerp", models=("m0",)) == 0
    merged = helpers.read_model(tmp_path / "out")
    assert_close(merged, ours(base, models[:1], tj.slerp(0.3)))
    capsys.readouterr()


def test_command_line_counts_the_models(tmp_path, capsys):
    helpers.save_family(tmp_path, 2)
    code = helpers.merge(tmp_path, method="slerp")
    helpers.refused(tmp_path, capsys, code, "slerp: merges exactly 1 fine-tuned model, got 2")
    code = helpers.merge(tmp_path, method="model_stock", models=("m0",))
    helpers.refused(tmp_path, capsys, code, "model_stock: merges at least 2 fine-tuned models, got 1")


def test_sparsifier_before_a_rule_on_weights_streams(tmp_path):
    """The models that the rule meets are the base plus what the sparsifier left."""
    base, models = helpers.save_family(tmp_path, 2)
    assert helpers.merge(tmp_path, "--sparsify", "magnitude:density=.5", "--quiet", method="karcher") == 0
    merged = helpers.read_model(tmp_path / "out")
    assert_close(merged, ours(base, models, tj.karcher(), sparsifier=tj.magnitude(0.5)))
