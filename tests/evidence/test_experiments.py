"""How a coefficient is tuned, and what controls prune."""

import numpy as np
import pytest

from examples.evidence import experiments, restored, tables
from examples.evidence.suites import Head, Part, Suite, Task, Tuned


@pytest.mark.parametrize("at", range(len(experiments.LENGTHS)))
def test_the_only_peak_is_found_and_no_length_is_measured_twice(at):
    seen = []

    def value(length):
        seen.append(length)
        return -abs(experiments.LENGTHS.index(length) - at)

    assert experiments.best_length(value) == experiments.LENGTHS[at]
    assert len(seen) == len(set(seen)) <= 11


def test_a_dip_on_the_way_does_not_stop_the_search():
    rising = {length: i for i, length in enumerate(experiments.LENGTHS)}
    rising[experiments.LENGTHS[10]] = 0
    assert experiments.best_length(rising.get) == experiments.LENGTHS[-1]


def test_controls_prune_as_much_as_tadrop_at_their_quantiles():
    rng = np.random.default_rng(0)
    stack = {"a": rng.normal(size=(2, 60, 50)).astype(np.float32), "b": rng.laplace(size=(2, 4000)).astype(np.float32)}
    ways = experiments.sparsifiers(Suite({}, [], None), stack)
    for quantiles in ("0.75/0.95", "0.95/0.99"):
        name = "" if quantiles == "0.75/0.95" else f" of {quantiles}"
        wanted = ways[f"TADrop {quantiles}"]().sparsity
        for control in ("uniform", "shuffled", "reversed"):
            arm = ways[control + name]()
            assert arm.sparsity == pytest.approx(wanted, abs=1e-3)
            shares = [np.mean(np.asarray(leaf) == 0) for leaf in (arm.stack["a"], arm.stack["b"])]
            assert (abs(shares[0] - shares[1]) < 1e-3) == (control == "uniform")
            assert (shares[0] < shares[1]) == (control == "reversed") or control == "uniform"
        grown, pruned = ways["scaling alone" + name](), ways[f"TADrop {quantiles}"]()
        assert grown.sparsity == 0
        for leaf, after in zip(grown.stack.values(), pruned.stack.values(), strict=True):
            kept = np.asarray(after) != 0  # pruned entries are back, the others have grown as much
            np.testing.assert_allclose(leaf[kept], np.asarray(after)[kept], rtol=0.01)


def test_dominance_has_a_control_that_prunes_as_much_of_each_task():
    rng = np.random.default_rng(0)
    stack = {"a": rng.normal(size=(2, 60, 50)).astype(np.float32), "b": rng.laplace(size=(2, 4000)).astype(np.float32)}
    stack["a"][0, :20] = 0
    ways = experiments.sparsifiers(Suite({}, [], None), stack)
    arm, control = ways["dominance 0.5"](), ways["uniform of dominance 0.5"]()
    for task in range(2):
        counts = [sum(np.count_nonzero(np.asarray(leaf[task])) for leaf in a.stack.values()) for a in (arm, control)]
        assert counts[0] == pytest.approx(counts[1], abs=2)
        kept = [np.count_nonzero(np.asarray(control.stack[n][task])) / np.count_nonzero(stack[n][task]) for n in "ab"]
        assert kept[0] == pytest.approx(kept[1], abs=1e-3)


def test_emr_restores_what_does_not_overlap_and_loses_what_does(tmp_path, monkeypatch):
    base = {"a": np.full((2, 4), 3.0, np.float32)}
    part = Part(np.zeros((1, 1)), np.zeros(1))
    task = Task("x", part, part, part, 2)

    def suite(*vectors):
        tuned = [{"a": base["a"] + np.float32(vector).reshape(2, 4)} for vector in vectors]
        return Suite(base, [Tuned(task, params, Head(*2 * (np.zeros(1),)), None) for params in tuned], None)

    apart = suite([1, 2, 0, 0, 0, 0, 0, 0], [0, 0, 3, -4, 0, 0, 0, 0])
    restored.compare(apart, tmp_path / "x-restored.csv", 0, ["none"], lambda done, all_: None)
    # Where both are the other sign wins: of the first task one entry is left, which is scaled to the sum of both, or,
    # when the entry that is dominated was dropped before, to the norm of both.
    against = suite([1, 2, 0, 0, 0, 0, 0, 0], [-4, 0, 3, 0, 0, 0, 0, 0])
    restored.compare(against, tmp_path / "x-restored.csv", 1, ["none", "dominance 0.5"], lambda done, all_: None)
    found = list(experiments.read(tmp_path / "x-restored.csv"))
    lengths = [float(length) for length in found[0]["length"].split()]
    assert lengths == pytest.approx([5**0.5 / 72**0.5, 5 / 72**0.5], abs=1e-4)
    assert [line["error"] for line in found] == ["0.0000 0.0000", "0.6325 0.0000", "0.4595 0.0000"]
    assert [line["cosine"] for line in found] == ["1.0000 1.0000", "0.8944 1.0000", "0.8944 1.0000"]

    (tmp_path / "results").mkdir()
    (tmp_path / "x-restored.csv").rename(tmp_path / "results" / "x-restored.csv")
    merges = [f"2,{seed},EMR,none,0,,0,{test},0 0" for seed, test in ((0, 0.5), (1, 0.7))]
    (tmp_path / "results" / "x.csv").write_text("\n".join([",".join(experiments.FIELDS), *merges]) + "\n")
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    shown = tables.restored("x-restored.csv", "2", "x.csv").splitlines()
    assert shown[2:4] == ["| none | 0.97 | 0.16 | 60.0 |", "| dominance 0.5 | 0.95 | 0.23 |  |"]
