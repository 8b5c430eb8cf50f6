"""Writing safetensors: what is written opens elsewhere, appears whole or not at all, and resumes."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tadrop_jax.checkpoints.safetensors import Sink, journal, open_sink, open_source
from tadrop_jax.errors import CheckpointError

WEIGHTS = {
    "odd": np.arange(3, dtype=np.int8),
    "wide": np.arange(10, dtype=np.float64).reshape(2, 5),
    "half": np.arange(7).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(5, np.int64),
    "single": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
}


def plan_of(weights: dict[str, np.ndarray]) -> dict:
    return {name: (array.dtype, array.shape) for name, array in weights.items()}


def fill(sink: Sink, weights: dict[str, np.ndarray]) -> None:
    for name, array in weights.items():
        for start in range(0, array.size, 2):
            sink.write(name, start, array.ravel()[start : start + 2])
        sink.mark_done(name)


def check_same(path: Path, weights: dict[str, np.ndarray]) -> None:
    """By the reference library's own reader."""
    found = {}
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        found |= dict(safetensors.deserialize(file.read_bytes()))
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        assert bytes(found[name]["data"]) == array.tobytes(), name
        assert tuple(found[name]["shape"]) == array.shape


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_one_file(tmp_path, name):
    out = tmp_path / name
    with open_sink(out, plan_of(WEIGHTS)) as sink:
        sink.add_file("report.json", b"{}")
        fill(sink, WEIGHTS)
        assert not out.exists()
        sink.finish()
    check_same(out, WEIGHTS)
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert (
        files
        == {
            "merged": {"merged/model.safetensors", "merged/report.json"},
            "merged.safetensors": {"merged.safetensors", "merged.report.json"},
        }[name]
    )
    with open_source(out) as source:
        assert source.metadata == {"format": "pt"}
        assert all(info.offset % info.dtype.itemsize == 0 for info in source.tensors.values())


def test_shards_and_index(tmp_path):
    weights = {f"w{i}": np.full(10, i, np.float32) for i in range(5)}
    weights["w2"] = np.full(50, 2, np.float32)
    with open_sink(tmp_path / "m", plan_of(weights), max_shard_size=80) as sink:
        fill(sink, weights)
        sink.finish()
    check_same(tmp_path / "m", weights)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 90
    homes = ["1", "1", "2", "3", "3"]
    assert index["weight_map"] == {f"w{i}": f"model-0000{n}-of-00003.safetensors" for i, n in enumerate(homes)}
    assert len(list((tmp_path / "m").iterdir())) == 4
    with open_source(tmp_path / "m") as source:
        assert list(source.tensors) == list(weights)


def test_an_empty_directory_is_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        fill(sink, WEIGHTS)
        sink.finish()
    check_same(tmp_path / "m", WEIGHTS)


def test_threads_share_a_sink(tmp_path):
    array = np.arange(100_000, dtype=np.int32)
    with open_sink(tmp_path / "m", {"x": (array.dtype, array.shape)}) as sink:
        with ThreadPoolExecutor(4) as pool:
            starts = range(0, 100_000, 1000)
            list(pool.map(lambda start: sink.write("x", start, array[start : start + 1000]), starts))
        sink.mark_done("x")
        sink.finish()
    check_same(tmp_path / "m", {"x": array})


def test_sidecars_are_copied(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with open_sink(tmp_path / "m", {}) as sink:
        sink.add_file("config.json", tmp_path / "config.json")
        sink.add_file("tasks/one/config.json", tmp_path / "config.json")
        for name in ("../x", "a/../../x", "/x", "", "..", "journal.jsonl", "model.safetensors"):
            with pytest.raises(CheckpointError, match="cannot be put there"):
                sink.add_file(name, b"")
        sink.finish()
    for name in ("config.json", "tasks/one/config.json"):
        assert (tmp_path / "m" / name).read_text() == '{"model_type": "gpt2"}'


@pytest.mark.parametrize("name", ["m", "m.safetensors"])
def test_an_occupied_output_is_refused_before_anything_is_written(tmp_path, name):
    if name == "m":
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("data")
    else:
        (tmp_path / name).write_text("data")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"{name}: .* (not empty|exists already)"):
        open_sink(tmp_path / name, plan_of(WEIGHTS))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_came_to_lie_beside_a_single_file_is_not_overwritten(tmp_path):
    sink = open_sink(tmp_path / "m.safetensors", plan_of(WEIGHTS))
    fill(sink, WEIGHTS)
    sink.add_file("config.json", b"ours")
    (tmp_path / "m.config.json").write_text("another's")
    with pytest.raises(CheckpointError, match=r"m.config.json: exists already"):
        sink.finish()
    assert not (tmp_path / "m.safetensors").exists()
    (tmp_path / "m.config.json").write_text("ours")  # as an interruption of the last step leaves it
    sink.finish()
    assert (tmp_path / "m.safetensors").exists()


def test_a_mount_point_is_refused():
    with pytest.raises(CheckpointError, match="mount point"):
        open_sink("/proc", plan_of(WEIGHTS))


def test_an_output_that_is_filled_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "m"
    sink = open_sink(out, plan_of(WEIGHTS))
    fill(sink, WEIGHTS)
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(CheckpointError, match="not empty"):
        sink.finish()
    sink.close()
    assert [file.name for file in out.iterdir()] == ["precious"]
    assert journal.NAME in os.listdir(sink.partial)


def test_an_unfinished_tensor_is_not_published(tmp_path):
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        sink.mark_done("odd")
        with pytest.raises(CheckpointError, match="5 tensors are unfinished, the first is 'wide'"):
            sink.finish()
    assert not (tmp_path / "m").exists()


def test_wrong_writes(tmp_path):
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        with pytest.raises(TypeError, match="'single' is planned as float32, got float64"):
            sink.write("single", 0, np.zeros(3))
        for start, count in ((-1, 1), (11, 2)):
            with pytest.raises(IndexError, match="'single'"):
                sink.write("single", start, np.zeros(count, np.float32))
        with pytest.raises(KeyError):
            sink.write("absent", 0, np.zeros(3))
        with pytest.raises(KeyError):
            sink.mark_done("absent")
    with pytest.raises(CheckpointError, match=r"x: safetensors files cannot hold dtype complex128"):
        open_sink(tmp_path / "n", {"x": (np.dtype(complex), (1,))})
    with pytest.raises(CheckpointError, match="must be positive, got 0"):
        open_sink(tmp_path / "n", {}, max_shard_size=0)
    assert not (tmp_path / "n.partial").exists()


def test_resume_goes_on_and_gives_the_same_bytes(tmp_path):
    options = {"max_shard_size": 60, "fingerprint": "ties 0.2"}
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), **options) as sink:
        for name in ("odd", "wide"):
            sink.write(name, 0, WEIGHTS[name])
            sink.mark_done(name)
        sink.write("single", 0, WEIGHTS["single"].ravel()[:5])
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True, **options) as sink:
        assert sink.done == {"odd", "wide"}
        fill(sink, {name: array for name, array in WEIGHTS.items() if name not in sink.done})
        sink.finish()
    with open_sink(tmp_path / "straight", plan_of(WEIGHTS), **options) as sink:
        fill(sink, WEIGHTS)
        sink.finish()
    for file in (tmp_path / "straight").iterdir():
        assert (tmp_path / "m" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "m").iterdir())) == len(list((tmp_path / "straight").iterdir()))


def test_a_killed_process_can_be_resumed(tmp_path):
    code = f"""
        import os, signal, numpy as np
        from tadrop_jax.checkpoints.safetensors import open_sink
        plan = {{name: (np.dtype(np.float32), (1000,)) for name in "abc"}}
        sink = open_sink({str(tmp_path / "m")!r}, plan, fingerprint="f")
        sink.write("a", 0, np.ones(1000, np.float32))
        sink.mark_done("a")
        sink.write("b", 0, np.ones(500, np.float32))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "m").exists()
    plan = dict.fromkeys("abc", (np.dtype(np.float32), (1000,)))
    with open_sink(tmp_path / "m", plan, fingerprint="f", resume=True) as sink:
        assert sink.done == {"a"}
        fill(sink, dict.fromkeys("bc", np.full(1000, 2, np.float32)))
        sink.finish()
    weights = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    assert {name: set(array) for name, array in weights.items()} == {"a": {1.0}, "b": {2.0}, "c": {2.0}}


@pytest.mark.parametrize("change", ["fingerprint", "plan", "shards"])
def test_resume_of_another_merge_is_refused(tmp_path, change):
    plan = plan_of(WEIGHTS)
    with open_sink(tmp_path / "m", plan, fingerprint="f") as sink:
        sink.mark_done("odd")
    if change == "plan":
        plan["odd"] = (np.dtype(np.uint8), (3,))
    options = {"fingerprint": "g" if change == "fingerprint" else "f"}
    options |= {"max_shard_size": 60} if change == "shards" else {}
    with pytest.raises(CheckpointError, match=r"m\.partial: belongs to another merge.*start afresh"):
        open_sink(tmp_path / "m", plan, resume=True, **options)
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), fingerprint="f", resume=True) as sink:
        assert sink.done == {"odd"}


def test_without_resume_it_starts_afresh(tmp_path):
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        sink.mark_done("odd")
        sink.add_file("old.json", b"")
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        assert sink.done == set()
        assert not (sink.partial / "old.json").exists()


def test_resume_with_nothing_to_resume_starts(tmp_path):
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True) as sink:
        assert sink.done == set()


def test_a_directory_of_the_users_is_not_deleted(tmp_path):
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "precious").write_text("data")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"m\.partial: exists and is not an unfinished merge"):
            open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=resume)
    assert (tmp_path / "m.partial" / "precious").read_text() == "data"


def test_two_processes_cannot_write_one_output(tmp_path):
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        for resume in (False, True):
            with pytest.raises(CheckpointError, match=r"m\.partial: another process is writing there"):
                open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=resume)
        fill(sink, WEIGHTS)
        sink.finish()


def test_a_torn_journal_keeps_what_is_whole(tmp_path):
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        sink.mark_done("odd")
        sink.mark_done("wide")
    file = sink.partial / journal.NAME
    file.write_bytes(file.read_bytes()[:-5])
    for _ in range(2):
        with open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True) as sink:
            assert sink.done == {"odd"}


def test_after_a_reboot_only_synced_tensors_are_trusted(tmp_path, monkeypatch):
    sink = open_sink(tmp_path / "m", plan_of(WEIGHTS))
    monkeypatch.setattr("tadrop_jax.checkpoints.safetensors.sink._SYNC_SECONDS", 0.0)
    began, go, fsync = threading.Event(), threading.Event(), os.fsync

    def slow(fd):
        began.set()
        assert go.wait(10)
        fsync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", slow)
        sink.mark_done("odd")
        assert began.wait(10)
        sink.mark_done("wide")  # while what was written before goes to the disk
        go.set()
        sink.close()
    monkeypatch.setattr("tadrop_jax.checkpoints.safetensors.sink._SYNC_SECONDS", 1e9)
    monkeypatch.setattr(journal, "boot", lambda: "the next boot")
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True) as sink:
        assert sink.done == {"odd"}
        sink.mark_done("half")
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True) as sink:
        assert sink.done == {"odd", "half"}
    monkeypatch.setattr(journal, "boot", lambda: "the one after")
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True) as sink:
        assert sink.done == {"odd"}


def test_what_does_not_reach_the_disk_is_an_error(tmp_path, monkeypatch):
    def broken(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    monkeypatch.setattr("tadrop_jax.checkpoints.safetensors.sink._SYNC_BYTES", 0)
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        sink.mark_done("odd")
        wait([sink._syncing])
        with pytest.raises(CheckpointError, match=r"m\.partial: .*Input/output error"):
            sink.mark_done("wide")


@pytest.mark.parametrize("when", ["while it computes", "at the end"])
def test_what_an_fsync_lost_is_not_trusted(tmp_path, monkeypatch, when):
    """The kernel drops what it could not write, and the next fsync succeeds."""

    def broken(fd):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    sync_bytes = "tadrop_jax.checkpoints.safetensors.sink._SYNC_BYTES"
    monkeypatch.setattr(sync_bytes, 0)
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        sink.mark_done("odd")
        wait([sink._syncing])
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", broken)
            if when == "at the end":
                patched.setattr(sync_bytes, 1 << 40)
                fill(sink, {name: WEIGHTS[name] for name in WEIGHTS if name != "odd"})
                with pytest.raises(CheckpointError, match="the disk is full"):
                    sink.finish()
            else:
                sink.mark_done("wide")
                wait([sink._syncing])
                with pytest.raises(CheckpointError, match="the disk is full"):
                    sink.mark_done("half")
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True) as sink:
        assert sink.done == {"odd"}
        monkeypatch.setattr(sync_bytes, 1 << 40)
        sink.mark_done("wide")
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True) as sink:
        assert sink.done == {"odd", "wide"}


@pytest.mark.parametrize("damage", ["absent", "short", "header"])
def test_a_damaged_shard_is_not_resumed(tmp_path, damage):
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        sink.mark_done("odd")
    shard = sink.partial / "model.safetensors"
    if damage == "absent":
        shard.unlink()
    elif damage == "short":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged or missing"):
        open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True)
    assert (sink.partial / journal.NAME).exists()


def test_a_disk_that_is_too_small_shows_at_the_start(tmp_path, monkeypatch):
    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(CheckpointError, match=r"m\.partial: the disk is full"):
        open_sink(tmp_path / "m", plan_of(WEIGHTS))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_for_the_journal(tmp_path, monkeypatch):
    def full(self, record):
        raise CheckpointError("the disk is full.")

    monkeypatch.setattr(Sink, "_log", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        open_sink(tmp_path / "out", plan_of(WEIGHTS))
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_fallocate(tmp_path, monkeypatch):
    def unsupported(fd, offset, length):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        fill(sink, WEIGHTS)
        sink.finish()
    check_same(tmp_path / "m", WEIGHTS)


def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    def full(fd, buffers, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_sink(tmp_path / "m", plan_of(WEIGHTS)) as sink:
        sink.mark_done("odd")
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(CheckpointError, match=r"m\.partial/model\.safetensors: the disk is full"):
            sink.write("wide", 0, WEIGHTS["wide"])
    assert not (tmp_path / "m").exists()
    with open_sink(tmp_path / "m", plan_of(WEIGHTS), resume=True) as sink:
        assert sink.done == {"odd"}


def test_discard(tmp_path):
    open_sink(tmp_path / "m", plan_of(WEIGHTS)).discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peers
def test_transformers_opens_it(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "src")
    with open_source(tmp_path / "src") as source:
        plan = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
        with open_sink(tmp_path / "dst", plan, max_shard_size=1000) as sink:
            for name, info in source.tensors.items():
                sink.write(name, 0, source.read(name, 0, info.size))
                sink.mark_done(name)
            sink.add_file("config.json", tmp_path / "src" / "config.json")
            sink.finish()
    assert len(list((tmp_path / "dst").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    for (name, ours), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert (ours == theirs).all(), name
