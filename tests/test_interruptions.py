"""Merges that break off, and go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tadrop_jax import __version__, cutting
from tadrop_jax.report import LINES, TensorLog
from tests.helpers import REPOSITORY, command, files_of, merge, read_model, report_of, save_family

pytestmark = pytest.mark.optimised

SHAPES = {"layer/kernel": (24, 9), "layer/bias": (9,), "head.weight": (3, 9)}


@pytest.fixture
def root(tmp_path) -> Path:
    """Directories base, m0 and m1."""
    save_family(tmp_path, 2, SHAPES, config={"model_type": "vit"})
    return tmp_path


class Interrupted(KeyboardInterrupt):
    """As Ctrl-C, which may come at any block."""


@pytest.mark.parametrize("method", ["ties", "emr", "t_switch", "tsv_c"])
@pytest.mark.parametrize("after", [1, 4])
def test_resume_gives_the_same_bytes(after, method, root, capsys, monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 64)
    monkeypatch.setattr(cutting, "SMALL", 64)
    assert merge(root, "--sparsify", "tadrop", method=method, out="whole") == 0
    real, calls = os.pwritev, []

    def stop(*args):
        calls.append(args)
        if len(calls) > after:
            raise Interrupted
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", stop)
        assert merge(root, "--sparsify", "tadrop", "--workers", "1", method=method) == 1
    said = capsys.readouterr().err
    assert "tadrop merge: interrupted\n" in said
    assert "--resume" in said
    assert not (root / "out").exists()
    assert (root / "out.partial").is_dir()
    assert merge(root, "--sparsify", "tadrop", "--resume", method=method) == 0
    assert files_of(root / "out") == files_of(root / "whole")
    assert report_of(root / "out") == report_of(root / "whole")
    assert not (root / "out.partial").exists()


@pytest.mark.parametrize("excluded", [[], ["--exclude", "bias"]], ids=["all", "one kept"])
def test_one_that_broke_off_while_it_was_made_durable(excluded, root, capsys, monkeypatch):
    assert merge(root, *excluded, out="whole") == 0

    def stop(fd):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", stop)
        assert merge(root, *excluded) == 1
    assert "--resume" in capsys.readouterr().err
    assert merge(root, *excluded, "--resume") == 0
    assert files_of(root / "out") == files_of(root / "whole")
    said, whole = report_of(root / "out"), report_of(root / "whole")
    assert said["tensors"] == whole["tensors"]
    assert sorted(said["tensors"]) == sorted(SHAPES)
    assert sorted(f.name for f in (root / "out").iterdir()) == sorted(f.name for f in (root / "whole").iterdir())


def test_one_whose_output_is_a_link(root, capsys, monkeypatch):
    (root / "behind").mkdir()
    (root / "out").symlink_to("behind")

    def stop(fd):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", stop)
        assert merge(root) == 1
    assert f"The work so far is in {root / 'behind'}.partial;" in capsys.readouterr().err
    assert merge(root, "--resume") == 0
    assert (root / "behind" / "model.safetensors").exists()
    assert (root / "out").is_symlink()


def test_an_interruption_before_there_is_any_work(root, capsys, monkeypatch):
    def stop(*args):
        raise Interrupted

    monkeypatch.setattr("tadrop_jax.directories.open_models", stop)
    assert merge(root) == 1
    said = capsys.readouterr().err
    assert "interrupted" in said
    assert "--resume" not in said


def test_a_line_of_the_log_that_was_cut_off_does_not_take_the_next_with_it(tmp_path):
    TensorLog(tmp_path, fresh=True).add("one", {"norm": [1.0]})
    with (tmp_path / LINES).open("a") as file:
        file.write('{"name": "two", "nor')
    log = TensorLog(tmp_path, fresh=False)
    log.add("two", {"norm": [2.0]})
    assert log.rows() == {"one": {"norm": [1.0]}, "two": {"norm": [2.0]}}


@pytest.fixture
def interrupted(root, monkeypatch):
    """A merge that broke off after its first write."""
    real, calls = os.pwritev, []

    def stop(*args):
        calls.append(args)
        if len(calls) > 2:
            raise Interrupted
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", stop)
        assert merge(root, "--workers", "1") == 1
    return root


@pytest.mark.parametrize(
    "other",
    [
        ["--coefficient", ".7"],
        ["--sparsify", "tadrop"],
        ["--dtype", "bfloat16"],
        ["--exclude", "bias"],
        ["--seed", "1"],
    ],
    ids=lambda o: o[0],
)
def test_another_merge_is_not_resumed(other, interrupted, capsys):
    assert merge(interrupted, "--resume", *other) == 2
    assert "out.partial: belongs to another merge" in capsys.readouterr().err
    assert not (interrupted / "out").exists()
    assert (interrupted / "out.partial").is_dir()
    assert merge(interrupted, "--resume") == 0


def test_an_input_that_has_changed_is_not_resumed(interrupted, capsys):
    tensors = read_model(interrupted / "m1")
    tensors["layer/bias"] = tensors["layer/bias"] + 1
    save_file(tensors, interrupted / "m1" / "model.safetensors")
    assert merge(interrupted, "--resume") == 2
    assert "out.partial: belongs to another merge" in capsys.readouterr().err


def test_a_merge_that_another_version_began_is_not_resumed(interrupted, capsys, monkeypatch):
    for module in ("directories", "checkpoints.safetensors.sink", "checkpoints.safetensors.journal"):
        monkeypatch.setattr(f"tadrop_jax.{module}.__version__", "9.9")
    assert merge(interrupted, "--resume") == 2
    said = f"out.partial: was begun by version {__version__} of tadrop_jax, and this is version 9.9, so it cannot be "
    assert said + "resumed; go on with that version, or start afresh" in capsys.readouterr().err
    journal = interrupted / "out.partial" / "journal.jsonl"
    journal.write_text(journal.read_text().replace(f', "version": "{__version__}"', ""))
    assert merge(interrupted, "--resume") == 2
    assert "was begun by an older version of tadrop_jax" in capsys.readouterr().err


def test_without_resume_it_starts_afresh(interrupted):
    assert merge(interrupted, "--coefficient", ".7") == 0
    assert merge(interrupted, "--coefficient", ".7", out="whole") == 0
    assert files_of(interrupted / "out") == files_of(interrupted / "whole")
    assert not (interrupted / "out.partial").exists()


def test_killed_and_resumed(tmp_path):
    """A real kill of a real process, in the middle of writing."""
    shapes = {f"block.{i}.weight": (250, 500) for i in range(64)}
    save_family(tmp_path, 2, shapes)
    argv = ["merge", "--base", "base", "--models", "m0", "m1", "--method", "task_arithmetic", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tadrop_jax.cli", *argv, "--workers", "1"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal, deadline = tmp_path / "out.partial" / "journal.jsonl", time.monotonic() + 60
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if journal.exists() and b'"done"' in journal.read_bytes():
                break
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    done = journal.read_bytes().count(b'"done"')
    assert 1 <= done < len(shapes)
    resumed = command(*argv, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert not (tmp_path / "out.partial").exists()
    first = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert merge(tmp_path) == 0
    assert files_of(tmp_path / "out") == first
    assert len(report_of(tmp_path / "out")["tensors"]) == len(shapes)
