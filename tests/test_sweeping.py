"""Sweeps over hyper-parameters: one compilation for arrays, a loop for the rest, one table."""

import csv
import re

import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)}
    models = [{"w": base["w"] + jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)} for _ in range(2)]
    target = base["w"] + 0.4 * (models[0]["w"] - base["w"])
    return base, models, target


def scorer(problem, traced: list | None = None):
    base, models, target = problem

    def evaluate(rule):
        if traced is not None:
            traced.append(rule)
        return -jnp.mean((tj.merge(base, models, rule)["w"] - target) ** 2)

    return evaluate


def test_64_settings_compile_once_and_equal_a_loop(problem):
    grid = {
        "density": (jnp.arange(8, dtype=jnp.float32) + 0.51) / 8,
        "coefficient": jnp.linspace(0.25, 2.0, 8),
    }
    traced = []
    evaluate = scorer(problem, traced)
    found = tj.sweep(tj.ties, grid, evaluate)
    assert len(found) == 64
    assert len(traced) == 1  # the merge was traced once, and so compiled in one program
    for row in found[::9]:
        alone = float(evaluate(tj.ties(row["density"], row["coefficient"])))
        np.testing.assert_allclose(row["score"], alone, rtol=1e-5)
    assert [row["coefficient"] for row in found[:2]] == [0.25, 0.5]  # the last name moves fastest
    assert found.best() == max(found, key=lambda row: row["score"])
    assert found.best(least=True) == min(found, key=lambda row: row["score"])


def test_lists_are_looped_and_arrays_vmapped(problem, tmp_path):
    traced = []
    evaluate = scorer(problem, traced)
    grid = {"combine": ["mean", "sum"], "coefficient": jnp.array([0.5, 1.0, 2.0]), "density": [0.5]}
    found = tj.sweep(tj.ties, grid, lambda rule: {"fit": evaluate(rule), "loss": -evaluate(rule)}, at_once=2)
    assert len(traced) == 4  # twice in each evaluation, two combinations
    assert [(r["combine"], r["coefficient"]) for r in found] == [(m, c) for m in ("mean", "sum") for c in (0.5, 1, 2)]
    for row in found:
        alone = float(evaluate(tj.ties(0.5, row["coefficient"], combine=row["combine"])))
        np.testing.assert_allclose(row["fit"], alone, rtol=1e-5)
    assert found.best("fit") == found.best("loss", least=True)
    with pytest.raises(tj.ParameterError, match="one of the scores fit, loss, got None"):
        found.best()
    found.to_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["fit"]) for r in rows] == [r["fit"] for r in found]
    assert list(rows[0]) == ["combine", "coefficient", "density", "fit", "loss"]


def test_settings_side_by_side(problem):
    """As in a random search; each setting of an array may be one number per task."""
    evaluate = scorer(problem)
    rows = np.float32([[0.4, 0.0], [0.2, 0.2], [0.0, 0.4]])
    found = tj.sweep(tj.task_arithmetic, {"coefficient": rows, "weights": jnp.ones(3)}, evaluate, product=False)
    assert len(found) == 3
    np.testing.assert_array_equal(found.best()["coefficient"], rows[0])
    mixed = tj.sweep(
        tj.task_arithmetic, {"coefficient": rows, "normalize": [False, False, True]}, evaluate, product=False
    )
    np.testing.assert_allclose(mixed[1]["score"], found[1]["score"], rtol=1e-6)
    with pytest.raises(tj.ParameterError, match="settings of one length"):
        tj.sweep(tj.task_arithmetic, {"coefficient": rows, "normalize": [True]}, evaluate, product=False)


def test_any_python_without_arrays(problem):
    """Nothing is traced, so the score may be a Python number; NaN is never best."""
    found = tj.sweep(lambda c: c, {"c": [1.0, 2.0, float("nan")]}, lambda c: c * c)
    assert found.best()["c"] == 2.0
    with pytest.raises(tj.ParameterError, match="is NaN"):
        tj.sweep(lambda c: c, {"c": [float("nan")]}, lambda c: c).best()


def test_a_list_of_settings_of_several_shapes():
    found = tj.sweep(lambda c: c, {"c": [0.3, [0.2, 0.4]]}, lambda c: np.sum(c))
    assert [row["c"] for row in found] == [0.3, [0.2, 0.4]]


@pytest.mark.parametrize(
    ("grid", "evaluate", "said"),
    [
        ({}, None, "the grid is empty"),
        ({"c": 0.5}, None, "must be an array or a list"),
        ({"c": "abc"}, None, "must be an array or a list"),
        ({"c": []}, None, "must be an array or a list"),
        ({"c": np.array(0.5)}, None, "must be an array or a list"),
        ({"c": [1.0]}, lambda c: np.ones(2), "must be one number"),
        ({"c": np.ones(2)}, lambda c: {"c": c}, "c is a hyper-parameter"),
    ],
)
def test_refusals(grid, evaluate, said):
    with pytest.raises(tj.ParameterError, match=said):
        tj.sweep(lambda c: c, grid, evaluate)


@pytest.mark.parametrize(
    ("factory", "name", "said"),
    [
        (tj.ties, "densty", "sweep: ties: got an unexpected keyword argument 'densty' (did you mean 'density'?)"),
        (lambda density, t: None, "density", "missing a required argument: 't'"),
    ],
)
def test_a_hyper_parameter_that_the_rule_does_not_have_is_named(factory, name, said):
    with pytest.raises(tj.MergeError, match=re.escape(said)):
        tj.sweep(factory, {name: [0.5]}, lambda rule: 0.0)


@pytest.mark.parametrize("at_once", [0, -1, 1.5, "2"])
def test_refuses_to_run_no_setting_at_once(at_once):
    with pytest.raises(tj.ParameterError, match="at_once must"):
        tj.sweep(lambda c: c, {"c": jnp.ones(2)}, lambda c: c, at_once=at_once)


@pytest.mark.parametrize("score", [None, "high", {"loss": None}], ids=str)
def test_a_score_that_is_no_number_is_refused(score):
    with pytest.raises(tj.ParameterError, match="sweep: a score must be one number, got"):
        tj.sweep(tj.task_arithmetic, {"coefficient": [0.3]}, lambda rule: score)
