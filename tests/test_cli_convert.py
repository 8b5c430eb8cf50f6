"""`tadrop convert`: there and back, what it says, and what it refuses."""

import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import converters
from converters.vit import Config, ViTForImageClassification
from tadrop_jax.cli import main
from tests.converters.files.torch_files import Call, save_zip

CONFIG = Config(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
    num_channels=1,
)


@pytest.fixture
def root(tmp_path):
    converters.save(tmp_path / "vit", ViTForImageClassification(CONFIG, rngs=nnx.Rngs(0)))
    (tmp_path / "vit" / "tokenizer.json").write_text("{}")
    return tmp_path


def convert(root, source, out, *more) -> int:
    return main(["convert", str(root / source), str(root / out), *more])


def refused(root, capsys, code, *words, out="out") -> None:
    said = capsys.readouterr()
    assert code == 2, said
    assert said.out == ""
    assert said.err.startswith("tadrop convert: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err, (word, said.err)
    assert not (root / out).exists()
    assert not [path.name for path in root.iterdir() if path.name.startswith(f".{out}")]


@pytest.mark.parametrize("format", [None, "safetensors", "msgpack", "npz"])
def test_there_and_back(format, root, capsys):
    more = () if format is None else ("--format", format)
    assert convert(root, "vit", "flax", "--to", "flax", *more) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "flax: ViTForImageClassification from safetensors for flax, 24 parameters" in said.out
    assert convert(root, "flax", "back", "--to", "torch", "--quiet") == 0
    assert capsys.readouterr().out == ""
    for file in (root / "vit").iterdir():
        assert (root / "back" / file.name).read_bytes() == file.read_bytes()


def test_a_tree_without_a_configuration(root, capsys):
    assert convert(root, "vit", "flax", "--to", "flax", "--format", "npz") == 0
    (root / "bare").mkdir()
    shutil.move(root / "flax" / "model.npz", root / "bare" / "model.npz")
    capsys.readouterr()
    refused(root, capsys, convert(root, "bare", "out", "--to", "torch"), "bare", "ViTForImageClassification")
    config = ("--config", str(root / "vit" / "config.json"))
    assert convert(root, "bare", "out", "--to", "torch", *config) == 0
    assert (root / "out" / "model.safetensors").read_bytes() == (root / "vit" / "model.safetensors").read_bytes()
    assert convert(root, "vit", "other", "--to", "torch", "--config", str(root / "absent.json")) == 2
    assert "absent.json: no such file" in capsys.readouterr().err


def test_what_is_fused_is_said_where_flax_takes_part(root, capsys):
    """Of the tensors that are there: this ViT has no bias of queries, keys and values, and pools without attention."""
    config = dataclasses.replace(CONFIG, layer_norm_eps=1e-6, qkv_bias=False)
    module = ViTForImageClassification(config, rngs=nnx.Rngs(0))
    converters.save(root / "timm", module, architecture="timm/VisionTransformer")
    assert convert(root, "timm", "flax", "--to", "flax") == 0
    assert "fused in PyTorch and apart in Flax: blocks.{i}.attn.qkv.weight; methods" in capsys.readouterr().out
    assert convert(root, "timm", "torch", "--to", "torch") == 0
    assert "fused in PyTorch" not in capsys.readouterr().out


def test_shards(root):
    assert convert(root, "vit", "out", "--to", "torch", "--max-shard-size", "1KB") == 0
    assert len(list((root / "out").glob("model-*.safetensors"))) > 2
    module, _ = converters.load(root / "out")
    assert module(np.ones((1, 8, 8, 1), np.float32)).shape == (1, 2)
    with pytest.raises(converters.ConversionError, match=r"is one of .* shards; give their directory"):
        converters.load(next((root / "out").glob("model-00002-*")))


def test_a_file_in_place_of_a_directory(root, capsys):
    said = "out.safetensors: what is written is a directory, and no .safetensors file"
    refused(root, capsys, convert(root, "vit", "out.safetensors", "--to", "torch"), said)


def test_shards_of_what_has_none(root, capsys):
    size = ("--max-shard-size", "1KB")
    refused(root, capsys, convert(root, "vit", "out", "--to", "flax", *size), "--max-shard-size", "orbax has no shards")


def test_what_is_wrong(root, capsys):
    refused(root, capsys, convert(root, "absent", "out", "--to", "flax"), "absent", "no such file or directory")
    code = convert(root, "vit", "out", "--to", "torch", "--format", "npz")
    refused(root, capsys, code, "format must be safetensors with torch")
    for other, to in (("CLIPModel", "torch"), ("ViTModel", "flax")):
        code = convert(root, "vit", "out", "--to", to, "--architecture", other)
        refused(root, capsys, code, f"vit: is ViTForImageClassification, which cannot be written as {other}\n")
    assert convert(root, "vit", "vit", "--to", "flax") == 2
    assert "not empty" in capsys.readouterr().err
    weights = root / "vit" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-9])
    refused(root, capsys, convert(root, "vit", "out", "--to", "flax"), "model.safetensors", "truncated")
    weights.unlink()
    attack = Call("posix", "system", f"touch {root / 'executed'}")
    save_zip(root / "vit" / "pytorch_model.bin", {"vit.layernorm.bias": attack})
    code = convert(root, "vit", "out", "--to", "flax")
    refused(root, capsys, code, "pytorch_model.bin", "holds code", "posix.system")
    assert not (root / "executed").exists()
    (root / "lora").mkdir()
    save_file({"w.lora_A.weight": np.ones((1, 2), np.float32)}, root / "lora" / "adapter_model.safetensors")
    refused(root, capsys, convert(root, "lora", "out", "--to", "flax"), "lora: is an adapter, no model")
    config = json.loads((root / "vit" / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (root / "vit" / "config.json").write_text(json.dumps(config))
    refused(root, capsys, convert(root, "vit", "out", "--to", "flax"), "LlamaForCausalLM is not supported")


@pytest.mark.parametrize("where", ["config.json", "x.config.json"])
def test_a_configuration_of_more_layers_than_tensors(root, capsys, where):
    """To build a module of them would take for ever."""
    source = root / "vit"
    if where != "config.json":  # of a file that merge wrote
        source = (root / "vit" / "model.safetensors").rename(root / "x.safetensors")
    config = json.loads((root / "vit" / "config.json").read_text()) | {"num_hidden_layers": 10**12}
    (source.parent / where if source.is_file() else source / where).write_text(json.dumps(config))
    said = f"{where}: tells of {10**12} layers, and {source} holds 24 tensors"
    refused(root, capsys, main(["convert", str(source), str(root / "out"), "--to", "flax"]), said)


@pytest.mark.parametrize(
    ("count", "said"),
    [(10**12, f"num_labels is {10**12}"), (None, "'NoneType' object cannot be interpreted as an integer")],
)
def test_a_configuration_of_more_classes_than_any_model_has(root, capsys, count, said):
    """To name them would take for ever."""
    file = root / "vit" / "config.json"
    config = json.loads(file.read_text())
    config = {n: v for n, v in config.items() if n not in ("id2label", "label2id")} | {"num_labels": count}
    file.write_text(json.dumps(config))
    refused(root, capsys, convert(root, "vit", "out", "--to", "flax"), f"{file}: a field has a value that no", said)


def test_the_report_of_a_merge_does_not_travel_along(root):
    (root / "vit" / "merge_report.json").write_text("{}")
    assert convert(root, "vit", "out", "--to", "flax") == 0
    assert (root / "out" / "config.json").exists()
    assert not (root / "out" / "merge_report.json").exists()


def test_an_output_that_cannot_be_begun(root, capsys):
    refused(root, capsys, convert(root, "vit", "/proc/x", "--to", "torch"), "/proc/x: cannot be written: No such file")


def test_an_empty_directory_by_another_name(root, monkeypatch):
    (root / "empty").mkdir()
    (root / "behind").mkdir()
    (root / "link").symlink_to("behind")
    monkeypatch.chdir(root / "empty")
    for out, written in (("../link", "behind"), (".", "empty")):
        assert main(["convert", "../vit", out, "--to", "torch"]) == 0
        assert (root / written / "model.safetensors").exists()
    assert (root / "link").is_symlink()


def test_a_source_that_cannot_be_read(root, capsys, monkeypatch):
    tokenizer = root / "vit" / "tokenizer.json"
    tokenizer.unlink()
    tokenizer.symlink_to("/proc/self/mem")  # root cannot read its beginning either
    code = convert(root, "vit", "out", "--to", "torch")
    refused(root, capsys, code, f"{tokenizer}: cannot be read: Input/output error")

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{path}/model.safetensors")

    monkeypatch.setattr("converters.loading.open_tensors", refuse)
    code = convert(root, "vit", "out", "--to", "torch")
    refused(root, capsys, code, f"{root / 'vit'}/model.safetensors: cannot be read: Permission denied")


def test_a_full_disk(root, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("converters.files.safetensors._write_file", full)
    assert convert(root, "vit", "out", "--to", "torch") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in root.iterdir()) == ["vit"]
