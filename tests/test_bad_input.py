"""Bad input, each case on real files: exit code 2, one message that says what to do, and nothing written."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tadrop_jax.cli import main
from tests.converters.files.torch_files import Call, save_zip, tensor
from tests.helpers import files_of, merge, read_model, refused, save_family, save_model

SHAPES = {"layer/kernel": (12, 5), "layer/bias": (5,)}


@pytest.fixture
def root(tmp_path) -> Path:
    """Directories base, m0 and m1."""
    save_family(tmp_path, 2, SHAPES)
    return tmp_path


def rewrite(model: Path, change) -> None:
    """Saves the model anew, with its tensors changed in place by a function."""
    tensors = {n: np.array(v) for n, v in read_model(model).items()}
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, model / "model.safetensors")


FILE = "m1/model.safetensors"

# What is done to m1, and what the message has to name.
STRUCTURE = {
    "missing tensor": (lambda w: w.pop("layer/bias"), ["m1", "lacks", "layer/bias", "--exclude"]),
    "extra tensor": (lambda w: w.update(head=np.ones(3, np.float32)), ["m1", "head", "base", "lacks"]),
    "both": (lambda w: w.update(bias=w.pop("layer/bias")), ["m1", "lacks tensor 'layer/bias'", "has tensor 'bias'"]),
    "shape": (
        lambda w: w.update({"layer/bias": np.ones(7, np.float32)}),
        [FILE, "base/model.safetensors", "layer/bias", "shape", "[7]", "[5]"],
    ),
    "transposed": (
        lambda w: w.update({"layer/kernel": np.ascontiguousarray(w["layer/kernel"].T)}),
        [FILE, "base/model.safetensors", "layer/kernel", "[5, 12]", "[12, 5]"],
    ),
    "dtype": (
        lambda w: w.update({"layer/bias": w["layer/bias"].astype(ml_dtypes.bfloat16)}),
        [FILE, "base/model.safetensors", "layer/bias", "dtype", "bfloat16", "float32"],
    ),
    "integer dtype": (
        lambda w: w.update({"layer/bias": w["layer/bias"].astype(np.int32)}),
        [FILE, "base/model.safetensors", "layer/bias", "int32", "float32"],
    ),
    "NaN": (
        lambda w: w["layer/kernel"].__setitem__((7, 3), np.nan),
        [FILE, "layer/kernel", "nan", "[7, 3]", "--allow-nonfinite"],
    ),
    "infinity": (
        lambda w: w["layer/bias"].__setitem__(4, -np.inf),
        [FILE, "layer/bias", "-inf", "[4]", "--allow-nonfinite"],
    ),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_models_that_do_not_fit(name, root, capsys):
    change, words = STRUCTURE[name]
    rewrite(root / "m1", lambda w: (change(w), None)[1])
    refused(root, capsys, merge(root), *words)


@pytest.mark.parametrize("method", ["ties", "emr"])
def test_what_is_not_finite_in_the_base(method, root, capsys):
    rewrite(root / "base", lambda w: w["layer/kernel"].__setitem__((0, 1), np.inf))
    refused(root, capsys, merge(root, method=method), "base/model.safetensors", "layer/kernel", "inf", "[0, 1]")


def test_what_is_not_finite_in_a_tensor_that_is_only_copied(root, capsys):
    rewrite(root / "base", lambda w: w["layer/bias"].__setitem__(2, np.nan))
    code = merge(root, "--exclude", "bias")
    refused(root, capsys, code, "base/model.safetensors", "layer/bias", "nan", "[2]", "--allow-nonfinite")


def test_not_finite_passes_if_allowed(root):
    rewrite(root / "m1", lambda w: w["layer/bias"].__setitem__(4, np.nan))
    assert merge(root, "--allow-nonfinite") == 0
    assert np.isnan(read_model(root / "out")["layer/bias"]).tolist() == [False] * 4 + [True]


def test_float64_is_refused(root, capsys):
    for name in ("base", "m0", "m1"):
        rewrite(root / name, lambda w: w.update({"layer/bias": w["layer/bias"].astype(np.float64)}))
    refused(root, capsys, merge(root), "base/model.safetensors", "layer/bias", "float64")


def test_nothing_to_merge(root, capsys):
    for name in ("base", "m0", "m1"):
        rewrite(root / name, lambda w: {"steps": np.arange(3)})
    refused(root, capsys, merge(root), "base", "no float tensor", "int64")


def truncated(file: Path):
    file.write_bytes(file.read_bytes()[:-9])


def corrupt(file: Path):
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F3\xff"'))


def wrong_offsets(file: Path):
    file.write_bytes(file.read_bytes().replace(b'"shape":[5]', b'"shape":[4]'))


def empty(file: Path):
    file.write_bytes(b"")


def text(file: Path):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def pickled(file: Path):
    file.unlink()
    (file.parent / "pytorch_model.bin").write_bytes(b"PK\x03\x04rest")


def folder(file: Path):
    file.unlink()
    file.mkdir()


def dangling(file: Path):
    file.unlink()
    file.symlink_to("nowhere")


def nothing(file: Path):
    shutil.rmtree(file.parent)


def bare(file: Path):
    file.unlink()


def adapter(file: Path):
    (file.parent / "adapter_config.json").write_text("{}")
    file.rename(file.with_name("adapter_model.safetensors"))


def adapter_file(file: Path):
    save_file({f"base_model.model.layer.lora_{part}.weight": np.ones((2, 2), np.float32) for part in "AB"}, file)


def other_dtype(file: Path):
    save_file({name: array.astype(np.float16) for name, array in load_file(file).items()}, file)


def config(file: Path):
    (file.parent / "config.json").write_text("{")


def unreadable_config(file: Path):
    (file.parent / "config.json").symlink_to("/proc/self/mem")  # root cannot read its beginning either


def unreadable_tokenizer(file: Path):
    (file.parents[1] / "base" / "tokenizer.json").symlink_to("/proc/self/mem")


def dangling_tokenizer(file: Path):
    """As in a cache of Hugging Face that was pruned."""
    (file.parents[1] / "base" / "tokenizer.json").symlink_to(file.parent / "nowhere")


DAMAGE = {
    truncated: [FILE, "truncated"],
    corrupt: [FILE, "header", "not valid JSON"],
    wrong_offsets: [FILE, "layer/bias", "[4]", "20 bytes", "16"],
    empty: [FILE, "not a safetensors file", "0 bytes"],
    text: [FILE, "git lfs pull"],
    pickled: ["m1", "pytorch_model.bin", "truncated or damaged"],
    folder: [FILE, "Is a directory"],
    dangling: [FILE, "No such file"],
    nothing: ["m1", "no such file or directory"],
    bare: ["m1", "holds no safetensors file, torch pickle"],
    config: ["m1/config.json", "not valid JSON"],
    unreadable_config: ["m1/config.json: cannot be read: Input/output error"],
    unreadable_tokenizer: ["base/tokenizer.json: cannot be read: Input/output error"],
    dangling_tokenizer: ["base/tokenizer.json: cannot be read: No such file"],
    adapter: ["m1", "is an adapter", "merge_and_unload", "tj.knots"],
    adapter_file: ["m1", "is an adapter", "merge_and_unload"],
    other_dtype: ["has dtype float16", "one dtype first"],
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_damaged_files(damage, root, capsys):
    damage(root / FILE)
    refused(root, capsys, merge(root), *DAMAGE[damage])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pt"])
@pytest.mark.parametrize("as_base", [False, True])
def test_code_in_a_pickle_is_never_run(name, as_base, root, capsys):
    weight = tensor(np.ones(3, np.float32))
    attack = Call("posix", "system", f"touch {root / 'executed'}")
    save_zip(root / name, {"layer": weight, "more": Call("torch._utils", "_rebuild_parameter", weight, True, attack)})
    base, model = (root / name, root / "m0") if as_base else (root / "base", root / name)
    code = main(["merge", "--base", f"{base}", "--models", f"{model}", "--method", "ties", "--out", f"{root / 'out'}"])
    refused(root, capsys, code, name, "holds code", "posix.system", "Nothing was run")
    assert not (root / "executed").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(root, capsys):
    (root / FILE).chmod(0)
    refused(root, capsys, merge(root), FILE, "Permission denied")


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        (
            "model-00002-of-00002.safetensors",
            ["model.safetensors.index.json", "model-00002-of-00002", "does not exist"],
        ),
        ("../m0/model.safetensors", ["model.safetensors.index.json", "../m0/model.safetensors", "outside"]),
        ("/etc/passwd", ["model.safetensors.index.json", "/etc/passwd", "outside"]),
    ],
    ids=["absent", "escapes", "absolute"],
)
def test_an_index_that_leads_elsewhere(shard, words, root, capsys):
    tensors = read_model(root / "m1")
    shutil.rmtree(root / "m1")
    save_model(root / "m1", tensors, shards=2)
    index = root / "m1" / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    described["weight_map"]["layer/bias"] = shard
    index.write_text(json.dumps(described))
    if not shard.startswith(("/", "..")):
        (root / "m1" / shard).unlink()
    refused(root, capsys, merge(root), "m1", *words)


def spelled(root: Path, how: str) -> str:
    """m0, once more."""
    if how == "link to the directory":
        (root / "again").symlink_to(root / "m0")
    elif how == "link to the file":
        (root / "again").mkdir()
        (root / "again" / "model.safetensors").symlink_to(root / "m0" / "model.safetensors")
    elif how == "hard link":
        (root / "again").mkdir()
        os.link(root / "m0" / "model.safetensors", root / "again" / "model.safetensors")
    spellings = {"the same": "m0", "with dots": "base/../m0", "the file": "m0/model.safetensors"}
    return f"{root}/{spellings.get(how, 'again')}"


@pytest.mark.parametrize(
    "how", ["the same", "with dots", "the file", "link to the directory", "link to the file", "hard link"]
)
def test_one_model_twice(how, root, capsys):
    again = spelled(root, how)
    code = main(
        ["merge", "--base", f"{root}/base", "--models", f"{root}/m0", again, "--method", "ties", "--out", f"{root}/out"]
    )
    refused(root, capsys, code, "same file", f"{root}/m0", again)


def test_models_may_share_a_shard(tmp_path):
    """As in the cache of Hugging Face, where a frozen part of two fine-tunes is one file."""
    _, (first, second) = save_family(tmp_path, 2, SHAPES, shards=2)
    shard = "model-00001-of-00002.safetensors"
    (tmp_path / "m1" / shard).unlink()
    (tmp_path / "m1" / shard).symlink_to(tmp_path / "m0" / shard)
    assert merge(tmp_path, method="average") == 0
    merged, shared = read_model(tmp_path / "out"), next(iter(SHAPES))
    want = {name: first[name] if name == shared else (first[name] + second[name]) / 2 for name in SHAPES}
    for name in SHAPES:
        np.testing.assert_allclose(merged[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "emr"])
def test_a_model_that_equals_the_base_is_a_warning(method, root, capsys):
    shutil.rmtree(root / "m1")
    shutil.copytree(root / "base", root / "m1")
    assert merge(root, method=method) == 0
    assert f"warning: {root / 'm1'}: equals the base" in capsys.readouterr().err
    report = json.loads((root / "out" / "merge_report.json").read_text())
    assert len(report["warnings"]) == 1


def warned(root, capsys) -> list[str]:
    """The warnings of a merge, as they were printed."""
    said = [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines() if "overflow" in line]
    report = json.loads((root / "out" / "merge_report.json").read_text())
    assert said == [line for line in report["warnings"] if "overflow" in line]
    return said


@pytest.mark.parametrize(
    ("method", "options", "values"),
    [
        ("average", [], "2 values"),
        ("average", ["--exclude", "bias"], "1 value"),
        ("average", ["--allow-nonfinite"], "2 values"),
        ("emr", [], "2 values"),  # one of the base, one of what the tasks share
    ],
)
def test_values_beyond_the_output_dtype_are_a_warning(method, options, values, root, capsys):
    """Whether they are merged or copied."""
    for t, name in enumerate(("base", "m0", "m1")):
        rewrite(root / name, lambda w, t=t: w["layer/bias"].__setitem__(slice(1, 3), [1e5, -6.4e4 - 8e4 * t]))
    if options == ["--allow-nonfinite"]:
        rewrite(root / "m0", lambda w: w["layer/bias"].__setitem__(0, np.nan))
    assert merge(root, "--dtype", "float16", *options, method=method) == 0
    (line,) = warned(root, capsys)
    assert line.startswith(f"layer/bias: {values} of finite inputs overflowed float16 and became infinite or NaN; ")
    assert "--dtype bfloat16 or float32" in line


def test_values_that_overflow_float32_are_a_warning(root, capsys):
    for name in ("m0", "m1"):
        rewrite(root / name, lambda w: w["layer/kernel"].__setitem__((3, 4), 3e38))
    assert merge(root, "--coefficient", "1", method="task_arithmetic") == 0
    (line,) = warned(root, capsys)
    assert line == "layer/kernel: 1 value of finite inputs overflowed float32 and became infinite or NaN"


def test_overflow_that_a_resumed_merge_had_seen(root, capsys, monkeypatch):
    for name in ("base", "m0", "m1"):
        rewrite(root / name, lambda w: {n: 0 * v + np.float32(1e5) for n, v in w.items()})
    options = ["--dtype", "float16", "--exclude", "bias"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupted)
        assert merge(root, *options, method="average") == 1
    capsys.readouterr()
    assert merge(root, *options, "--resume", method="average") == 0
    assert sorted(line.split(" of ")[0] for line in warned(root, capsys)) == [
        "layer/bias: 5 values",
        "layer/kernel: 60 values",
    ]


def interrupted(*args):
    raise KeyboardInterrupt


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_too_small(root, capsys, monkeypatch):
    """The files get their full size before the first tensor is read."""
    monkeypatch.setattr(os, "posix_fallocate", no_space, raising=False)
    refused(root, capsys, merge(root), "out.partial", "disk is full")


def test_a_disk_that_fills_up_midway(root, capsys, monkeypatch):
    assert merge(root, "--out", str(root / "whole")) == 0
    capsys.readouterr()
    real, calls = os.pwritev, []

    def full(*args):
        calls.append(args)
        return real(*args) if len(calls) == 1 else no_space()

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        assert merge(root, "--workers", "1") == 1
    said = capsys.readouterr().err
    assert "disk is full" in said
    assert f"{root / 'out'}.partial" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert not (root / "out").exists()
    assert (root / "out.partial").is_dir()
    assert merge(root, "--resume") == 0
    assert files_of(root / "out") == files_of(root / "whole")
    assert not (root / "out.partial").exists()


def test_a_log_that_does_not_fit_on_the_disk(root, capsys, monkeypatch):
    from tadrop_jax.report import TensorLog

    monkeypatch.setattr(TensorLog, "add", no_space)
    assert merge(root) == 1
    assert re.search("disk is full|No space left", capsys.readouterr().err)
    assert not (root / "out").exists()


def test_a_file_that_shrinks_while_it_is_read(root, capsys, monkeypatch):
    """Whatever the cause, it failed midway: what is done can be used again."""
    from tadrop_jax import streaming

    real = streaming.run

    def run(*args, **kwargs):
        os.truncate(root / FILE, (root / FILE).stat().st_size - 20)
        return real(*args, **kwargs)

    monkeypatch.setattr("tadrop_jax.directories.run", run)
    assert merge(root) == 1
    said = capsys.readouterr().err
    assert FILE in said
    assert "ends at byte" in said
    assert not (root / "out").exists()
