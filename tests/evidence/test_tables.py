"""Tables and pictures of a small file made by hand: differences are paired, by seed and task, and by task count."""

import numpy as np
import pytest
import scipy.stats

pytest.importorskip("matplotlib")
from examples.evidence import pictures, tables
from examples.evidence.experiments import FIELDS

ROWS = {
    ("2", "0", "none"): "0.50 0.60",
    ("2", "0", "TADrop 0.75/0.95"): "0.70 0.70",
    ("2", "1", "none"): "0.40 0.60",
    ("2", "1", "TADrop 0.75/0.95"): "0.70 0.50",
    ("3", "0", "none"): "0.30 0.40 0.90",
    ("3", "0", "TADrop 0.75/0.95"): "0.60 0.70 0.90",
    ("3", "1", "uniform"): "0.10 0.10 0.10",
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    folder.mkdir()
    lines = [f"{t},{s},EMR,{name},0.5,,0,0,{values}" for (t, s, name), values in ROWS.items()]
    (folder / "x-growth.csv").write_text("\n".join([",".join(FIELDS), *lines]) + "\n")
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    return folder


def test_growth_pairs_what_both_arms_have_and_gives_the_t_interval(results):
    found = tables.growth("x-growth.csv", "EMR", "all", "TADrop 0.75/0.95", "none", "uniform").splitlines()
    gains = 100 * np.array([0.2, 0.1, 0.3, -0.1])
    low, high = scipy.stats.t.interval(0.95, 3, gains.mean(), scipy.stats.sem(gains))
    assert found[0] == "| before EMR | 2 tasks | 3 tasks |"
    assert found[2] == "| TADrop 0.75/0.95, accuracy | 65.0 | 73.3 |"
    assert found[3].startswith(f"| minus none | {gains.mean():+.2f} ± {(high - low) / 2:.2f} | +20.00 ±")
    assert found[4] == "| minus uniform |  |  |"  # no seed has both


def test_validation_has_a_mean_where_every_suite_has_the_arm(results):
    def write(name, *arms):
        rows = [f"2,{seed},EMR,{arm},0.5,,{value},0,0 0" for seed, arm, value in arms]
        (results / name).write_text("\n".join([",".join(FIELDS), *rows]) + "\n")

    both = (0, "TADrop 0.9/0.99", 0.7), (1, "TADrop 0.9/0.99", 0.8)
    write("a.csv", *both, (0, "TADrop 0.5/0.9", 0.5), (0, "TADrop norm 1", 0.1), (0, "uniform", 0.2))
    write("b.csv", (0, "TADrop 0.9/0.99", 0.6))
    write("c.csv", (0, "TADrop 0.9/0.99", 0.6))  # the same line once more counts once
    found = tables.validation("EMR", "a.csv 2", "b.csv+c.csv 2").splitlines()
    assert found[0] == "| quantiles | a | b | mean |"
    assert found[2:] == ["| 0.5/0.9 | 50.0 |  |  |", "| 0.9/0.99 | 75.0 | 60.0 | 67.5 |"]


def test_a_table_turned_has_a_row_for_each_rule(results):
    arguments = "x-growth.csv", "2", "TADrop 0.75/0.95", "none", "uniform"
    usual = tables.differences(*arguments).splitlines()
    turned = tables.TABLES["differences_by_rule"](*arguments).splitlines()
    assert usual[0] == "| TADrop 0.75/0.95 minus | EMR |"
    assert turned[0] == "| TADrop 0.75/0.95 minus | none | uniform |"
    assert turned[2] == f"| EMR | {usual[2].removeprefix('| none | ').removesuffix(' |')} |  |"
    assert turned[3:] == usual[4:]


def test_growth_on_the_first_tasks_alone(results):
    found = tables.growth("x-growth.csv", "EMR", "2", "TADrop 0.75/0.95", "none").splitlines()
    assert found[2].endswith("| 65.0 | 65.0 |")
    assert found[3].endswith("| +30.00 ± 0.00 |")  # not bold: one seed


def test_growth_on_the_tasks_that_were_learned(results):
    models = ("seed,task,probe,tuned", "0,a,0.50,0.51", "0,b,0.50,0.60", "0,c,0.50,0.52")
    (results / "models.csv").write_text("\n".join(models) + "\n")
    found = tables.growth("x-growth.csv", "EMR", "models.csv", "TADrop 0.75/0.95", "none").splitlines()
    assert found[2].endswith("| 60.0 | 80.0 |")
    assert found[3].endswith("| +0.00 ± 127.06 | +15.00 ± 190.59 |")


def test_growth_where_no_task_was_learned_is_empty(results):
    (results / "models.csv").write_text("seed,task,probe,tuned\n0,a,0.50,0.51\n0,b,0.50,0.50\n0,c,0.50,0.60\n")
    found = tables.growth("x-growth.csv", "EMR", "models.csv", "TADrop 0.75/0.95", "none").splitlines()
    assert found[2:] == ["| TADrop 0.75/0.95, accuracy |  | 90.0 |", "| minus none |  | +0.00 |"]


def test_differences_from_the_probes_of_a_file_of_models(results):
    models = ("0,a,0.50,0.9", "0,b,0.60,0.9", "1,a,0.60,0.9", "1,b,0.40,0.9", "2,a,0.10,0.9", "2,b,0.10,0.9")
    (results / "models.csv").write_text("\n".join(["seed,task,probe,tuned", *models]) + "\n")
    found = tables.differences("x-growth.csv", "2", "TADrop 0.75/0.95", "none", "models.csv").splitlines()
    assert found[0] == "| TADrop 0.75/0.95 minus | EMR |"
    assert found[3].startswith("| the probe | +12.50 ± ")  # of .2, .1, .1, .1
    assert found[-1] == "*2 tasks, 2 seeds of fine-tuning.*"


def half_width(gains):
    low, high = scipy.stats.t.interval(0.95, len(gains) - 1, np.mean(gains), scipy.stats.sem(gains))
    return (high - low) / 2


def test_intervals_over_tasks_take_the_seeds_mean_first_and_those_over_seeds_the_tasks(results):
    found = tables.over_tasks("x-growth.csv", "2", "EMR", "TADrop 0.75/0.95", "none").splitlines()
    tasks, seeds = half_width([25, 0]), half_width([15, 10])
    assert found[2] == f"| none | +12.50 ± {tasks:.2f}; ± {seeds:.2f} | 1 | 0 |"


def test_bold_is_what_leaves_out_zero_both_over_tasks_and_over_seeds():
    pair = np.array([[0.10, 0.11], [0.12, 0.11], [0.11, 0.10]])
    few_tasks = np.array([[0.0, 0.3], [0.0, 0.31], [0.0, 0.3]])
    assert [tables.established(values) for values in (pair, pair[:1], few_tasks, few_tasks.T)] == [True, *[False] * 3]
    assert half_width(few_tasks.mean(1)) < few_tasks.mean() < half_width(few_tasks.mean(0))
    assert tables.two_ways(pair).startswith("**+10.83 ± ")
    assert tables.two_ways(pair[:1]) == f"+10.50 ± {100 * half_width(pair[0]):.2f}"
    assert tables.two_ways(np.zeros((0, 2))) == ""


def test_lines_are_means_over_tasks_and_seeds(results):
    lines = ("2,0,0.0,alone,0.5 0.7", "2,0,0.0,together,0.5 0.7", "2,1,0.0,alone,0.6 0.8", "2,1,0.0,together,0.1 0.1")
    (results / "x-lines.csv").write_text("\n".join(["tasks,seed,share,way,by_task", *lines]) + "\n")
    assert tables.lines("x-lines.csv").splitlines()[2:] == ["| 0 | 65.0 | 35.0 |"]


def test_the_picture_of_growth_is_drawn(results):
    pictures.main()
    assert "<svg" in (results / "x-growth.svg").read_text()


def test_suites_have_both_intervals_and_say_where_seeds_are_fewer(results):
    (results / "y.csv").write_text((results / "x-growth.csv").read_text().replace("2,1,EMR,none", "2,1,EMR,other"))
    (results / "models.csv").write_text("seed,task,probe,tuned\n0,a,0.5,0.9\n0,b,0.5,0.5\n1,a,0.5,0.9\n1,b,0.5,0.9\n")
    suites = "x-growth.csv 2 as all of it", "y.csv 2", "x-growth.csv 2 without b of models.csv", "x-growth.csv 3"
    found = tables.suites("EMR", *suites, "TADrop 0.75/0.95 minus none").splitlines()
    assert found[0] == "| EMR: TADrop 0.75/0.95 minus | seeds | none |"
    assert found[2] == f"| all of it | 2 | +12.50 ± {half_width([25, 0]):.2f}; ± {half_width([15, 10]):.2f} |"
    assert found[3] == "| y | 1 | +15.00 ± 63.53 |"
    assert found[4] == f"| x-growth | 2 | +25.00 ± {half_width([20, 30]):.2f} |"  # one task: over seeds alone
    some = tables.suites("EMR", "y.csv 2", "TADrop 0.75/0.95 minus none", "other minus other").splitlines()
    assert some[0] == "| EMR | seeds | TADrop 0.75/0.95 minus none | other minus other |"
    assert some[2] == "| y | 1 | +15.00 ± 63.53 | +0.00 ± 0.00 |"
    nothing = tables.suites("EMR", "x-growth.csv 2", "other minus none", "more minus none").splitlines()
    assert nothing[0] == "| EMR: minus none | seeds | other | more |"
    assert not nothing[2:]


def test_rules_have_a_row_each(results):
    (results / "z.csv").write_text((results / "x-growth.csv").read_text().replace("EMR", "TIES"))
    suites = "x-growth.csv 2 as one", "z.csv 2 as two", "z.csv 3 as three"
    found = tables.rules(*suites, "TADrop 0.75/0.95 minus none", "other minus none").splitlines()
    heads = (f"{name}: TADrop 0.75/0.95 minus none" for name in ("one", "two", "three"))
    assert found[0] == f"|  | {' | '.join(heads)} |"
    said = f"+12.50 ± {half_width([25, 0]):.2f}; ± {half_width([15, 10]):.2f}"
    alone = f"+20.00 ± {half_width([30, 30, 0]):.2f}"
    assert found[2:] == [f"| EMR | {said} |  |  |", f"| TIES |  | {said} | {alone} |"]


def test_what_stands_is_what_is_established_out_of_all_with_two_seeds(results):
    arms = (("none", ".1 .1", ".1 .2"), ("more", ".3 .3", ".3 .4"), ("less", ".3 .1", ".1 .2"))
    lines = [f"2,{i},TIES,{name},0,,0,0,{of[i]}" for name, *of in arms for i in range(2)]
    (results / "z.csv").write_text("\n".join([",".join(FIELDS), *lines]) + "\n")
    (results / "z-models.csv").write_text("seed,task,probe,tuned\n0,a,0.5,0.9\n")
    found = tables.standing("more minus none", "less minus none").splitlines()
    assert found[2:-2] == ["| z | 2 | 2 | TIES | more minus none | **+20.00 ± 0.00; ± 0.00** |"]
    assert found[-1].endswith("more minus none: 1, less minus none: 1.*")


def test_lengths_that_were_chosen(results):
    lines = (
        "2,0,TIES,none,0,0.1,0,0,0",
        "2,0,TIES,uniform,0,0.1,0,0,0",
        "2,0,TIES,DARE,0,2.5,0,0,0",
        "2,0,EMR,none,0,,0,0,0",
    )
    (results / "z.csv").write_text("\n".join([",".join(FIELDS), *lines]) + "\n")
    assert tables.lengths("z.csv 2").splitlines()[2:] == ["| z | 2 | 3 | 0.1, 2 | 2.5, 1 |"]


def test_accuracies_of_each_task_beside_probes_and_fine_tunes(results):
    models = ("0,a,0.50,0.9", "0,b,0.60,0.9", "1,a,0.60,0.8", "1,b,0.40,0.9", "0,c,0.1,0.1")
    (results / "models.csv").write_text("\n".join(["seed,task,probe,tuned", *models]) + "\n")
    found = tables.each_task("models.csv", "x-growth.csv", "2", "EMR", "none").splitlines()
    assert found[0] == "|  | a | b | mean |"
    assert found[2:] == [
        "| probe | 55.0 | 50.0 | 52.5 |",
        "| fine-tuned | 85.0 | 90.0 | 87.5 |",
        "| EMR, none | 45.0 | 60.0 | 52.5 |",
    ]


def test_ratios_of_kinds_side_by_side(results):
    head = "tensor,entries,ratio,sd_over_tasks,sparsity,conflict"
    (results / "x-ratios.csv").write_text(f"{head}\nh/0/bias,4,0.2,0,0,0\nh/1/bias,4,0.4,0,0,0\n")
    (results / "y-ratios.csv").write_text(f"{head}\nh/0/bias,4,0.5,0,0,0\nhead,4,0.6,0,0,0\n")
    found = tables.kinds("x-ratios.csv", "y-ratios.csv").splitlines()
    assert found[0] == "| tensors | x | y |"
    assert found[2:] == ["| `h/*/bias` | 0.30 | 0.50 |", "| `head` |  | 0.60 |"]


def test_differences_and_accuracies_say_where_seeds_are_fewer(results):
    lines = (results / "x-growth.csv").read_text() + "2,0,EMR,other,0.5,,0,0.99,0.9 0.9\n"
    (results / "z.csv").write_text(lines)
    assert "| other | -20.00 ± 0.00 (1) |" in tables.differences("z.csv", "2", "TADrop 0.75/0.95", "other")
    assert "(1)" not in tables.differences("z.csv", "2", "TADrop 0.75/0.95", "none")
    rows = tables.accuracies("z.csv", "2").splitlines()
    assert [row for row in rows if row.startswith("| other")] == [
        "| other | 0.50 | 99.0 (1) |"
    ]  # not the best: one seed
