"""One merge on disk by several processes: whoever comes last, and whatever broke off, the same bytes as by one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax import __version__, processes
from tadrop_jax.planning import Request
from tests.helpers import CACHE, REPOSITORY, files_of, merge, read_model, refused, report_of, save_family

pytestmark = pytest.mark.optimised

SHAPES = {"a.weight": (48, 40), "b.weight": (40, 16), "c.bias": (7,), "d.scale": (), "lm_head.weight": (48, 40)}
TIES = ("--density", "0.3")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    save_family(folder, shapes=SHAPES, config={"model_type": "none"})
    (folder / "base" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def alone(root):
    """What one process makes of it, by method."""
    assert merge(root, *TIES, out="ties", method="ties") == 0
    assert merge(root, "--sparsify", "tadrop", out="emr", method="emr") == 0
    return root


def by(root, i: int, n: int, out, *more, **how) -> int:
    """Process i of n, files of at most 4 kB."""
    return merge(
        root, "--processes", str(n), "--process", str(i), "--max-shard-size", "4KB", *more, out=str(out), **how
    )


def check_equal(out, alone, processes: int) -> None:
    """A valid directory of as many files as its index and their names tell, with the tensors of the other."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert files == [f"model-{k:05}-of-{len(files):05}.safetensors" for k in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    found, wanted = read_model(out), read_model(alone)
    assert found.keys() == wanted.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in wanted.values())
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name
    beside, others = ({n: c for n, c in files_of(path).items() if "safetensors" not in n} for path in (out, alone))
    assert beside == others
    ours, theirs = report_of(out), report_of(alone)
    assert ours["tensors"] == theirs["tensors"]
    assert ours["warnings"] == theirs["warnings"]
    assert ours["scalars"] == theirs["scalars"]
    assert ours.get("size") == theirs.get("size")
    assert ours["processes"] == processes
    assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_whoever_is_last(order, alone, tmp_path, capsys):
    out = tmp_path / "out"
    for i in order:
        assert not out.exists()
        assert by(alone, i, 3, out, *TIES, method="ties") == 0
        said = capsys.readouterr().out
        assert ("appears with the last one" in said) == (i != order[-1])
    check_equal(out, alone / "ties", 3)
    # Its launcher runs all of them again.
    before = files_of(out)
    assert by(alone, order[0], 3, out, *TIES, "--resume", method="ties") == 0
    assert files_of(out) == before
    capsys.readouterr()
    assert by(alone, order[0], 3, out, *TIES, method="ties") == 2
    assert "not empty" in capsys.readouterr().err


def test_a_bundle(alone, tmp_path):
    for i in (1, 0):
        assert by(alone, i, 2, tmp_path / "out", "--sparsify", "tadrop", method="emr") == 0
    check_equal(tmp_path / "out", alone / "emr", 2)


def test_real_processes_at_once(alone, tmp_path):
    argv = [
        sys.executable,
        "-m",
        "tadrop_jax.cli",
        "merge",
        "--base",
        "base",
        "--models",
        "m0",
        "m1",
        "--method",
        "ties",
    ]
    argv += [*TIES, "--max-shard-size", "4KB", "--out", str(tmp_path / "out"), "--processes", "2", "--process"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_COMPILATION_CACHE_DIR": CACHE}
    running = [subprocess.Popen([*argv, str(i)], cwd=alone, env=environment) for i in range(2)]
    try:
        assert [process.wait(120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    check_equal(tmp_path / "out", alone / "ties", 2)


def test_what_broke_off_goes_on(alone, tmp_path, monkeypatch, capsys):
    """While a tensor is written, while shares are joined, and between the two."""
    out = tmp_path / "out"
    assert by(alone, 0, 2, out, *TIES, method="ties") == 0
    sink = sys.modules["tadrop_jax.checkpoints.safetensors.sink"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(sink.os, "pwritev", full)
        assert by(alone, 1, 2, out, *TIES, method="ties") == 1
    assert "--resume goes on" in capsys.readouterr().err
    moved, rename = [], processes.Path.rename

    def interrupted(self, to):
        if moved:
            raise KeyboardInterrupt
        if self.suffix == ".safetensors" and "whole" in str(to):
            moved.append(to)
        return rename(self, to)

    with monkeypatch.context() as broken:
        broken.setattr(processes.Path, "rename", interrupted)
        assert by(alone, 1, 2, out, *TIES, "--resume", method="ties") == 1
    assert moved
    assert not out.exists()
    assert by(alone, 0, 2, out, *TIES, "--resume", method="ties") == 0
    check_equal(out, alone / "ties", 2)


def test_records_of_a_share_are_no_part_of_the_result(alone, tmp_path):
    """They go when a share has appeared: a process may break off between the two."""
    out = tmp_path / "out"
    assert by(alone, 0, 2, out, *TIES, method="ties") == 0
    for record in ("journal.jsonl", "merge_report.jsonl"):
        (tmp_path / "out.partial" / "0" / record).write_text("{}\n")
    assert by(alone, 1, 2, out, *TIES, method="ties") == 0
    check_equal(out, alone / "ties", 2)


def test_shares_of_another_merge_are_not_joined(alone, tmp_path, capsys):
    out = tmp_path / "out"
    assert by(alone, 0, 2, out, "--density", "0.9", method="ties") == 0
    assert "another merge" not in capsys.readouterr().err
    assert by(alone, 1, 2, out, *TIES, method="ties") == 0
    assert "out.partial/0: is of another merge; process 0 has to run again" in capsys.readouterr().err
    assert not out.exists()
    assert by(alone, 0, 2, out, *TIES, method="ties") == 0
    check_equal(out, alone / "ties", 2)


def test_a_share_of_another_merge_is_not_resumed(alone, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert by(alone, 0, 2, out, "--density", "0.9", method="ties") == 0
    before = files_of(tmp_path)
    assert by(alone, 0, 2, out, *TIES, "--resume", method="ties") == 2
    assert "out.partial/0: belongs to another merge" in capsys.readouterr().err
    for module in ("directories", "checkpoints.safetensors.journal"):
        monkeypatch.setattr(f"tadrop_jax.{module}.__version__", "9.9")
    assert by(alone, 0, 2, out, "--density", "0.9", "--resume", method="ties") == 2
    assert f"out.partial/0: was begun by version {__version__} of tadrop_jax" in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_refused(root, capsys):
    for more in (("--process", "1"), ("--processes", "2"), ("--processes", "2", "--process", "2")):
        assert merge(root, *more) == 2
        refused(root, capsys, 2, "--process I and --processes N")
    assert by(root, 0, 6, "out") == 2
    refused(root, capsys, 2, "5 tensors, too few for 6 processes")
    alone = ("--processes", "2", "--process", "0", "--out", str(root / "out.safetensors"))
    refused(root, capsys, merge(root, *alone), "must be a directory")
    (root / "out.partial").mkdir()
    (root / "out.partial" / "journal.jsonl").write_text("")
    assert by(root, 0, 2, "out") == 2
    assert "unfinished merge by one process" in capsys.readouterr().err


def test_shares_are_balanced():
    sizes = {f"t{i}": s for i, s in enumerate([100, 60, 50, 40, 30, 20, 10, 10])}
    layout = {name: (np.dtype(np.uint8), (size,)) for name, size in sizes.items()}
    seen: list[str] = []
    for i in range(3):
        request = Request(Path("base"), (), Path("out"), tj.chain(), {}, process=i, processes=3)
        share = processes.share_of(request, layout, {n: n for n in layout}, sizes)
        seen += share.tensors
        assert 100 <= sum(sizes[n] for n in share.tensors) <= 110
    assert sorted(seen) == sorted(sizes)


@pytest.mark.peers
def test_transformers_opens_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    for seed, name in enumerate(("base", "m0", "m1")):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    for i in (1, 0):
        assert by(tmp_path, i, 2, "out") == 0
    assert merge(tmp_path, out="alone") == 0
    ours, theirs = (transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name) for name in ("out", "alone"))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
