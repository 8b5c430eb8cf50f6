"""Merging checkpoints of several formats, also mixed ones, gives the bytes that safetensors would have given."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import converters
from converters.gpt2.config import GPT2Config
from converters.gpt2.model import GPT2LMHeadModel
from converters.vit import Config, ViTForImageClassification
from tadrop_jax.cli import main
from tests.converters.files.torch_files import save_legacy, save_zip, state_dict
from tests.helpers import merge, read_model, refused, save_family

pytestmark = pytest.mark.optimised

SHAPES = {"layer.kernel": (12, 5), "layer.bias": (5,), "scale": ()}


def as_pickle(folder, save=save_zip, nested=True, shards=1) -> None:
    tensors = read_model(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i}.bin"
        part = state_dict({f"module.{n}" if nested else n: tensors[n] for n in names[i::shards]})
        save(folder / file, {"model": part} if nested else part)
        files |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("method", ["ties", "emr"])
def test_pickles_are_merged_as_safetensors_are(method, tmp_path):
    save_family(tmp_path, 2, SHAPES)
    assert merge(tmp_path, method=method, out="plain") == 0
    as_pickle(tmp_path / "base", nested=False, shards=2)
    as_pickle(tmp_path / "m0", save_legacy)
    (tmp_path / "m1" / "pytorch_model.bin").unlink(missing_ok=True)
    as_pickle(tmp_path / "m1")
    (tmp_path / "m1" / "adapter_config.json").write_text("{}")  # of an adapter that lies beside it
    save_file({"w.lora_A.weight": np.ones((1, 2), np.float32)}, tmp_path / "m1" / "adapter_model.safetensors")
    assert merge(tmp_path, "--digests", method=method) == 0
    ours, plain = (read_model(tmp_path / name) for name in ("out", "plain"))
    assert ours.keys() == plain.keys()
    for name, want in plain.items():
        assert ours[name].tobytes() == want.tobytes(), name
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert all(len(row["sha256"]) == 64 for row in report["inputs"])


def test_a_missing_shard_of_a_pickle(tmp_path, capsys):
    save_family(tmp_path, 2, SHAPES)
    as_pickle(tmp_path / "m1", nested=False, shards=2)
    (tmp_path / "m1" / "pytorch_model-1.bin").unlink()
    refused(tmp_path, capsys, merge(tmp_path), "m1", "index.json", "pytorch_model-1.bin", "does not exist")


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """A base and three fine-tunes of a Vision Transformer, as PyTorch directories."""
    root = tmp_path_factory.mktemp("vits")
    config = Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    base = ViTForImageClassification(config, rngs=nnx.Rngs(0))
    converters.save(root / "base", base)
    state = nnx.to_pure_dict(nnx.state(base, nnx.Param))
    for t in range(3):
        rng = np.random.default_rng(t)
        moved = {
            path: np.asarray(leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32))
            for path, leaf in converters.mapping.flatten(state).items()
        }
        converters.save(root / f"m{t}", converters.mapping.nest(moved), config)
    return root


@pytest.fixture
def mixed(vits, tmp_path):
    """The same as: a pickle (base), Orbax, safetensors, and msgpack of Flax without a configuration."""
    for name in ("base", "m1"):
        shutil.copytree(vits / name, tmp_path / name)
    as_pickle(tmp_path / "base")
    converters.convert(vits / "m0", tmp_path / "m0", to="flax")
    converters.convert(vits / "m2", tmp_path / "flax", to="flax", format="msgpack")
    (tmp_path / "m2").mkdir()
    (tmp_path / "flax" / "flax_model.msgpack").rename(tmp_path / "m2" / "flax_model.msgpack")
    return tmp_path


MODELS = ("m0", "m1", "m2")


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_mixed_formats_merge_in_the_layout_of_the_base(method, vits, mixed):
    extra = ("--sparsify", "dare:density=0.5") if method == "task_arithmetic" else ()
    assert merge(vits, *extra, method=method, models=MODELS, out=f"plain-{method}") == 0
    assert merge(mixed, *extra, method=method, models=MODELS) == 0
    for name in ("model.safetensors", "config.json"):
        assert (mixed / "out" / name).read_bytes() == (vits / f"plain-{method}" / name).read_bytes()
    module, _ = converters.load(mixed / "out")
    assert module(np.ones((1, 8, 8, 1), np.float32)).shape == (1, 2)


@pytest.mark.parametrize("format", ["orbax", "msgpack"])
@pytest.mark.parametrize("sparsifier", ["dare:density=0.5", "n_m:n=2,m=4", "della:density=.5,epsilon=.2"])
def test_a_base_in_flax_merges_as_in_pytorch(sparsifier, format, vits, mixed):
    """Random numbers and groups follow PyTorch's names and axes; the result has the base's."""
    extra, out = ("--sparsify", sparsifier), f"plain-{sparsifier}-{format}"
    assert merge(vits, *extra, models=MODELS, out=out) == 0
    (mixed / "base").rename(mixed / "torch")
    converters.convert(mixed / "torch", mixed / "base", to="flax", format=format)
    assert merge(mixed, *extra, models=MODELS) == 0
    assert "vit/layernorm/scale" in read_model(mixed / "out")
    converters.convert(mixed / "out", mixed / "back", to="torch")
    ours, plain = read_model(mixed / "back"), read_model(vits / out)
    assert ours.keys() == plain.keys()
    for name, want in plain.items():
        np.testing.assert_array_equal(ours[name], want, err_msg=name)


def test_a_bad_entry_is_named_by_its_place_in_the_file(vits, mixed, capsys):
    converters.convert(vits / "m1", mixed / "flax1", to="flax", format="npz")
    file = mixed / "flax1" / "model.npz"
    arrays = {n: np.array(a) for n, a in converters.read_tensors(file).items()}
    arrays["vit/encoder/layer/0/intermediate/dense/kernel"][7, 3] = np.nan
    np.savez(file, **arrays)
    models = ("--models", f"{mixed / 'm0'}", f"{mixed / 'm2'}", "--method", "ties", "--out", f"{mixed / 'out'}")
    assert main(["merge", "--base", f"{mixed / 'flax1'}", *models]) == 2
    said = capsys.readouterr().err
    assert "intermediate/dense/kernel' holds nan at [7, 3]" in said


def test_inspect_takes_mixed_formats(mixed, capsys):
    models = [str(mixed / name) for name in MODELS]
    assert main(["inspect", "--base", str(mixed / "base"), "--models", *models, "--json", str(mixed / "j.json")]) == 0
    assert "vit.layernorm.weight" in json.loads((mixed / "j.json").read_text())["tensors"]


def test_a_tree_that_is_of_another_model(mixed, capsys):
    file = mixed / "m2" / "flax_model.msgpack"
    tensors = {n: np.asarray(leaf) for n, leaf in converters.files.open_tensors(file).tensors.items()}
    file.unlink()
    tensors["vit/layernorm/scale"] = np.ones(3, np.float32)
    converters.files.msgpack.write(file, tensors)
    code = merge(mixed, models=MODELS)
    said = capsys.readouterr().err
    assert code == 2
    assert "m2" in said
    assert "vit/layernorm/scale" in said
    assert not (mixed / "out").exists()


def test_a_model_of_another_architecture(mixed, capsys):
    other = GPT2Config(vocab_size=7, n_positions=4, n_embd=8, n_layer=2, n_head=2)
    converters.save(mixed / "gpt2", GPT2LMHeadModel(other, rngs=nnx.Rngs(0)))
    assert merge(mixed, models=("m0", "gpt2")) == 2
    first, *few, last = capsys.readouterr().err.splitlines()
    assert f"{mixed / 'gpt2'}: its tensors have other names or axes than those of {mixed / 'base'}" in first
    assert len(few) == 5
    assert last == "  unmapped: and 23 more"


def test_a_tree_of_an_unknown_architecture(tmp_path, capsys):
    save_family(tmp_path, 2, SHAPES)
    tensors = {name.replace(".", "/"): value for name, value in read_model(tmp_path / "m1").items()}
    shutil.rmtree(tmp_path / "m1")
    (tmp_path / "m1").mkdir()
    converters.files.npz.write(tmp_path / "m1" / "model.npz", tensors)
    refused(tmp_path, capsys, merge(tmp_path), "base", "do not tell the architecture")


@pytest.mark.parametrize("format", ["orbax", "msgpack", "npz"])
def test_trees_of_an_unknown_architecture_merge_among_themselves(format, tmp_path):
    shapes = {"layer/kernel": (12, 5), "layer/bias": (5,), "scale": ()}
    save_family(tmp_path, 2, shapes)
    assert merge(tmp_path, method="ties", out="plain") == 0
    for name in ("base", "m0", "m1"):
        tensors = read_model(tmp_path / name)
        shutil.rmtree(tmp_path / name)
        (tmp_path / name).mkdir()
        converters.files.write_tensors(tmp_path / name, tensors, format, 1 << 30)
    assert merge(tmp_path, method="ties") == 0
    ours, plain = (read_model(tmp_path / name) for name in ("out", "plain"))
    assert {n: a.tobytes() for n, a in ours.items()} == {n: a.tobytes() for n, a in plain.items()}


def test_the_report_names_parts_of_fused_tensors(tmp_path):
    """OpenAI's CLIP has query, key and value in one tensor: what goes by rows or at random differs there."""
    from converters.clip import MODELS, TextConfig, VisionConfig
    from converters.clip import Config as ClipConfig

    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = TextConfig(**size, vocab_size=9, max_position_embeddings=4, projection_dim=6)
    config = ClipConfig(text, VisionConfig(**size, image_size=8, patch_size=4, projection_dim=6), projection_dim=6)
    for seed, name in enumerate(("base", "m0", "m1")):
        module = MODELS["CLIPModel"](config, rngs=nnx.Rngs(seed))
        converters.save(tmp_path / name, module, architecture="openai/CLIP", to="flax", format="npz")
    assert merge(tmp_path, method="dare_linear") == 0
    rows = json.loads((tmp_path / "out" / "merge_report.json").read_text())["tensors"]
    told = {name for name, row in rows.items() if "in PyTorch" in row}
    assert told == {name for name in rows if any(f"/{p}_proj/" in name for p in "qkv")}
