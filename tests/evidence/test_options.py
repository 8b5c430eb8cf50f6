"""What is asked for and is not there, or does not fit, ends in one sentence before anything is trained."""

import json
import subprocess
import sys

import numpy as np
import pytest

from examples.evidence import __main__ as command
from examples.evidence import experiments, language, multimodal, options, vision, vision_tasks
from examples.evidence.suites import Part

FAST = ("vision", "--fast")


def refused(capsys, *arguments):
    """What the command says when it refuses: its last line."""
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def planned(*arguments):
    """What would be done."""
    parser = options.parser(None)
    return options.plan(parser, parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize("option", ["--recipe=x", "--count=9", "--tasks=x", "--rules=x", "--sparsifiers=x"])
def test_what_there_is_not(option, tmp_path, capsys):
    name, given = option.split("=")
    said = refused(capsys, "vision", "--data", tmp_path, "--out", tmp_path / "out", option)
    assert f"{name}: there is no {given if name == '--count' else repr(given)}; there are " in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seeds", "-1"), "argument --seeds: -1 is not a whole number from 0 on"),
        (("--width", "0"), "argument --width: 0 is not a whole number from 1 on"),
        (("--pretraining", "-1"), "argument --pretraining: -1 is not above 0"),
        (("--seeds", "0", "0"), "--seeds: 0 is there twice"),
        (("--tasks", "digits_odd", "digits_odd"), "--tasks: 'digits_odd' is there twice"),
        (("--rules", "EMR", "EMR"), "--rules: 'EMR' is there twice"),
        (("--tasks", "mnist"), "--tasks: with --fast there is no 'mnist'; there are 'digits_odd', 'digits_loops'"),
        (("--recipe", "sgd"), "--recipe: --fast has its own, fast, not sgd"),
        (("--count", "30"), "--count: --fast has its own, 2, not 30"),
        (("--data", "."), "--data: --fast has its own data"),
        (("--sparsifiers",), "--sparsifiers: nothing is left to merge"),
    ],
)
def test_what_a_fast_run_cannot_do(arguments, said, tmp_path, capsys):
    if arguments == ("--sparsifiers",):
        arguments = ("--rules", "EMR", "--sparsifiers")
    assert said in refused(capsys, *FAST, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_how_many_tasks_follows_from_which(tmp_path, capsys):
    arguments = "--data", tmp_path, "--out", tmp_path, "--tasks", "mnist", "--count", "8"
    assert "--count: --tasks says which" in refused(capsys, "vision", *arguments)


def test_data_that_are_not_there_or_not_all(tmp_path, capsys):
    arguments = "vision", "--out", tmp_path / "out", "--tasks", "mnist_odd", "turned_tiny"
    assert "--data is needed, or --fast" in refused(capsys, *arguments)
    assert f"there is no directory {tmp_path / 'no'}" in refused(capsys, *arguments, "--data", tmp_path / "no")
    said = refused(capsys, *arguments, "--data", tmp_path)
    assert said.endswith("lacks tiny_imagenet32/tiny_imagenet32.npz, mnist/mnist.npz")
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "mnist.npz").touch()
    (tmp_path / "out" / "base").mkdir(parents=True)  # whose data are of no use then
    assert planned(*arguments[:4], "mnist_odd", "--data", tmp_path).names == ("mnist_odd",)


def test_every_image_task_is_read_from_the_files_that_it_is_said_to_need(monkeypatch):
    seen = []

    def read(data, name):
        seen.append(f"{name}/{name}.npz")
        labels = np.arange(10 if "mnist" in name else 200, dtype=np.int32)
        part = Part(np.zeros((len(labels), 4, 4, 3), np.uint8), labels)
        return part, part

    monkeypatch.setattr(vision_tasks, "_read", read)
    for name in vision_tasks.KNOWN:
        seen.clear()
        vision_tasks._labelled("data", name)
        assert vision_tasks.files(name) == seen, name


def test_texts_and_pictures_need_files_too():
    assert language.files("sst2") == language.files("mr") == ["text/sst2.tsv.gz", "text/mr.tsv.gz"]
    assert language.files("trec") == multimodal.files("trec") == ["text/trec.tsv.gz"]
    assert multimodal.files("gtsrb") == ["gtsrb/gtsrb.npz"]
    assert multimodal.files("statements") == ["mnist/mnist.npz", "fashion_mnist/fashion_mnist.npz"]
    assert len(multimodal.files("pacs_questions")) == 3
    needed = {*vision.files(None), *language.files(None), *multimodal.files("matching")}
    assert set(multimodal.files(None)) == needed


def test_a_run_merges_the_main_arms_and_all_if_asked_and_few_if_fast(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "files", lambda name: [])
    usual = planned("vision", "--data", tmp_path, "--out", tmp_path)
    assert (usual.sparsifiers, usual.seeds, usual.recipe) == (experiments.MAIN, (0, 1, 2), "adamw")
    assert {rule for _, rule in usual.merges} == {*experiments.RULES, *experiments.OWN}
    assert {rule for name, rule in usual.merges if name == "own"} == set(experiments.OWN)
    every = planned("vision", "--data", tmp_path, "--out", tmp_path, "--sparsifiers", "all")
    assert len(every.sparsifiers) > 60
    assert set(experiments.MAIN) < set(every.sparsifiers)
    fast = planned(*FAST, "--out", tmp_path)
    assert fast.seeds == (0,)
    assert len(fast.merges) == 16
    own = planned(*FAST, "--out", tmp_path, "--seeds", "1", "2", "--rules", "TIES", "--sparsifiers", "none")
    assert (own.seeds, own.merges) == ((1, 2), (("own", "TIES"), ("none", "TIES")))


def test_lines_of_an_older_version_are_not_added_to(tmp_path, capsys):
    (tmp_path / "fast-lines.csv").write_text("tasks,seed,share,way,by_task\n")
    assert "columns of an older version" in refused(capsys, *FAST, "--out", tmp_path, "--lines")
    assert not planned(*FAST, "--out", tmp_path).lines


def test_what_was_under_way_is_metered_when_the_program_is_ended(tmp_path):
    program = (
        "import pathlib, time; from examples.evidence import __main__ as command; command.stoppable()\n"
        f"with command.metered(pathlib.Path({str(tmp_path / 'hours.csv')!r}), 'a step'):\n"
        "    print('begun', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.wait(60) == 143
    assert (tmp_path / "hours.csv").read_text().splitlines()[1].startswith("a step,0.00")


def test_a_table_has_one_kind_of_lines(tmp_path, capsys):
    table = tmp_path / "fast.csv"
    table.write_text(",".join(experiments.FIELDS) + "\n")
    arguments = *FAST, "--out", tmp_path
    assert planned(*arguments).names == ("digits_odd", "digits_loops")  # an older table says nothing
    said = {"recipe": "fast", "bfloat16": True, "tasks": {"2": ["digits_loops", "digits_odd"]}}
    path = tmp_path / "fast-tasks.json"
    path.write_text(json.dumps(said))
    assert "--bfloat16: fast.csv was judged in bfloat16, not float32" in refused(capsys, *arguments)
    wanted = "--tasks: fast.csv has merges of digits_loops, digits_odd, not of digits_odd, digits_loops"
    assert wanted in refused(capsys, *arguments, "--bfloat16")
    assert planned(*arguments, "--bfloat16", "--tasks", "digits_odd").names == ("digits_odd",)
    assert planned(*arguments, "--table", "other").table == tmp_path / "other.csv"
    path.write_text(json.dumps(said | {"recipe": "sgd"}))
    assert "--recipe: fast.csv is of models tuned by sgd, not fast" in refused(capsys, *arguments, "--bfloat16")
    table.unlink()  # to be made anew, in whatever way
    assert planned(*arguments).table == table
