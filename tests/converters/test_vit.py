"""Vision Transformer directories: against transformers, byte for byte, and bad input."""

import json
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import converters
from converters import ConversionError
from converters.vit import MODELS, Config, table

Model = MODELS["ViTForImageClassification"]

TINY = Config(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
    num_channels=1,
    labels=("odd", "even", "neither"),
)


@pytest.fixture(scope="module")
def tiny():
    return Model(TINY, rngs=nnx.Rngs(0))


@pytest.fixture
def directory(tiny, tmp_path):
    converters.save(tmp_path / "vit", tiny)
    return tmp_path / "vit"


def test_a_saved_model_loads_with_the_same_bytes_and_config(tiny, directory, tmp_path):
    module, params = converters.load(directory)
    assert module.config == TINY
    images = jnp.ones((2, 8, 8, 1))
    np.testing.assert_array_equal(module(images), tiny(images))
    converters.save(tmp_path / "again", params, module.config)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_bfloat16_and_shards_survive(tiny, directory, tmp_path):
    tensors = converters.read_tensors(directory)
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    names = sorted(half)
    (directory / "model.safetensors").unlink()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: half[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    module, params = converters.load(directory)
    assert params["classifier"]["kernel"].dtype == jnp.bfloat16
    converters.save(tmp_path / "again", module)
    again = converters.read_tensors(tmp_path / "again")
    assert again.keys() == half.keys()
    assert all(again[name].tobytes() == half[name].tobytes() for name in half)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_directory_with_wrong_tensors_names_them_all(directory):
    tensors = converters.read_tensors(directory)
    del tensors["vit.layernorm.bias"]
    tensors["classifier.weight"] = np.zeros((5, 8), np.float32)
    tensors["vit.pooler.dense.bias"] = np.zeros(8, np.float32)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        converters.load(directory)
    assert str(directory) in str(caught.value)
    assert len(caught.value.problems) == 3
    for name in ("vit.layernorm.bias", "classifier.weight", "vit.pooler.dense.bias"):
        assert name in str(caught.value)


def test_damaged_or_missing_files_are_named(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ConversionError, match=r"model\.safetensors: the file is truncated"):
        converters.load(directory)
    weights.unlink()
    with pytest.raises(ConversionError, match=r"holds no safetensors file, torch pickle"):
        converters.load(directory)
    (directory / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ConversionError, match=r"config\.json: architecture BertModel is not supported"):
        converters.load(directory)


def test_save_refuses_a_full_directory_and_incomplete_parameters(tiny, directory, tmp_path):
    before = (directory / "model.safetensors").read_bytes()
    with pytest.raises(ConversionError, match="not empty"):
        converters.save(directory, tiny)
    assert (directory / "model.safetensors").read_bytes() == before
    params = nnx.to_pure_dict(nnx.state(tiny, nnx.Param))
    with pytest.raises(ConversionError, match="config="):
        converters.save(tmp_path / "new", params)
    del params["classifier"]["bias"]
    with pytest.raises(ConversionError, match=r"missing: classifier\.bias"):
        converters.save(tmp_path / "new", params, TINY)
    assert not (tmp_path / "new").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["vit"]


def test_unsupported_configurations_say_why():
    with pytest.raises(ConversionError, match="hidden_act is 'mish'"):
        Config.from_dict({"hidden_act": "mish"})
    with pytest.raises(ConversionError, match="heads do not divide"):
        Config(hidden_size=10, num_attention_heads=4)


def test_the_table_covers_the_model_and_nothing_moves_twice(tiny):
    names = converters.to_torch(tiny, table(TINY, "ViTForImageClassification"))
    assert len(names) == 4 + 2 * 16 + 2 + 2
    assert names["vit.encoder.layer.1.attention.attention.query.weight"].shape == (8, 8)


def test_importing_converters_is_cheap():
    code = "import sys, converters; print([m for m in ('jax', 'flax', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Each differs from the next in something that the forward pass could get wrong.
CONFIGS = [
    {"hidden_size": 12, "num_attention_heads": 3, "image_size": 8, "patch_size": 2, "num_channels": 1}
    | {"num_labels": 5},
    {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "image_size": [8, 12],
        "patch_size": [4, 3],
        "num_channels": 3,
    }
    | {"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
]


@pytest.mark.peers
@pytest.mark.parametrize("fields", CONFIGS)
def test_logits_and_files_agree_with_transformers(fields, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.ViTConfig(num_hidden_layers=2, intermediate_size=20, initializer_range=0.5, **fields)
    peer = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():  # biases and scales start at 0 and 1, where a mix-up would not show
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "peer")

    module, _ = converters.load(tmp_path / "peer")
    size = module.config.image_size
    shape = (3, config.num_channels, *((size, size) if isinstance(size, int) else size))
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with torch.no_grad():
        want = peer(torch.tensor(images)).logits.numpy()
    np.testing.assert_allclose(module(images.transpose(0, 2, 3, 1)), want, rtol=1e-5, atol=1e-5)

    converters.save(tmp_path / "ours", module)
    ours, theirs = (tmp_path / who / "model.safetensors" for who in ("ours", "peer"))
    assert ours.read_bytes() == theirs.read_bytes()
    again, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.id2label == config.id2label
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(torch.tensor(images)).logits.numpy(), want)
