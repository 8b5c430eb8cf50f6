"""Vision Transformer directories: against transformers, byte for byte, and bad input."""

import json
import subprocess
import sys

import hypothesis
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import strategies as st

import converters
from converters import ConversionError
from converters.families import detect
from converters.mapping import flatten
from converters.vit import MODELS, Config, table
from tests.converters.peer_models import assert_same_bytes, forward, perturbed, save_peer

HEADS = ("ViTModel", "ViTForImageClassification")
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
    converters.save(tmp_path / "again", params, module.config)  # which names the architecture
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
        converters.save(tmp_path / "new", params, TINY, architecture="ViTForImageClassification")
    assert not (tmp_path / "new").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["vit"]


def test_unsupported_configurations_say_why():
    with pytest.raises(ConversionError, match="hidden_act is 'mish'"):
        Config.from_dict({"hidden_act": "mish"})
    with pytest.raises(ConversionError, match="heads do not divide"):
        Config(hidden_size=10, num_attention_heads=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "8"), ("num_attention_heads", None), ("num_hidden_layers", []), ("image_size", "8"),
     ("id2label", ["a"]), ("hidden_act", {}), ("architectures", 1)],
)  # fmt: skip
def test_values_of_another_kind_are_told_with_their_file(field, value, directory):
    described = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(described | {field: value}))
    with pytest.raises(ConversionError, match=r"config.json: a field has a value that no"):
        converters.load(directory)


def test_the_table_covers_the_model_and_nothing_moves_twice(tiny):
    names = converters.to_torch(tiny, table(TINY, "ViTForImageClassification"))
    assert len(names) == 4 + 2 * 16 + 2 + 2
    assert names["vit.encoder.layer.1.attention.attention.query.weight"].shape == (8, 8)


def test_importing_converters_is_cheap():
    code = "import sys, converters; print([m for m in ('jax', 'flax', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_files_without_a_pooler_make_a_module_without_one(tmp_path):
    config = Config.from_dict(TINY.to_dict() | {"add_pooling_layer": False})
    module = MODELS["ViTModel"](config, rngs=nnx.Rngs(0))
    converters.save(tmp_path / "vit", module)
    assert "add_pooling_layer" not in json.loads((tmp_path / "vit" / "config.json").read_text())
    again, _ = converters.load(tmp_path / "vit")
    assert again.config == config
    assert again(jnp.ones((1, 8, 8, 1))).pooled is None
    converters.convert(tmp_path / "vit", tmp_path / "flax", to="flax", format="msgpack")
    assert converters.load(tmp_path / "flax")[0].config == config


def test_without_a_configuration_the_heads_are_asked_for(directory):
    (directory / "config.json").unlink()
    names = converters.read_tensors(directory)
    assert detect({}, names).name == "ViTForImageClassification"
    bare = [name.removeprefix("vit.") for name in names if name.startswith("vit.")]
    assert detect({}, bare).name == "ViTModel"
    with pytest.raises(ConversionError, match="number of heads"):
        converters.load(directory)
    (directory / "config.json").write_text('{"model_type": "deit", "num_attention_heads": 2}')
    with pytest.raises(ConversionError, match="model_type is 'deit'"):
        converters.load(directory)


def test_images_of_another_size_are_refused(tiny):
    with pytest.raises(ValueError, match=r"must be \(batch, 8, 8, 1\), got \(1, 4, 16, 1\)"):
        tiny(jnp.zeros((1, 4, 16, 1)))


def test_trees_of_transformers_4():
    """The paths are those of FlaxViTModel and FlaxViTForImageClassification."""
    layer = "encoder/layer/1/"
    paths = {
        "embeddings/cls_token": (1, 1, 8),
        "embeddings/position_embeddings": (1, 5, 8),
        "embeddings/patch_embeddings/projection/kernel": (4, 4, 1, 8),
        layer + "attention/attention/query/kernel": (8, 8),
        layer + "attention/output/dense/bias": (8,),
        layer + "intermediate/dense/kernel": (8, 12),
        layer + "output/dense/kernel": (12, 8),
        layer + "layernorm_before/scale": (8,),
        "layernorm/bias": (8,),
        "pooler/dense/kernel": (8, 8),
    }
    model, classifier = (
        {path: leaf.shape for path, leaf in flatten(nnx.eval_shape(make)).items()}
        for make in [lambda name=name: MODELS[name](TINY, rngs=nnx.Rngs(0)) for name in HEADS]
    )
    assert paths.items() <= model.items()
    del paths["pooler/dense/kernel"]
    assert {f"vit/{path}": shape for path, shape in paths.items()}.items() <= classifier.items()
    assert classifier["classifier/kernel"] == (8, 3)
    assert len(model) == 4 + 2 * 16 + 2 + 2


# --- against transformers ---------------------------------------------------------------------------------------------

# The first of each is what hypothesis tries first: the example that has most in it.
CONFIGS = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.sampled_from([2, 1]),
        "num_attention_heads": st.sampled_from([3, 1, 2]),
        "head_width": st.sampled_from([4, 2]),
        "intermediate_size": st.sampled_from([20, 5]),
        "hidden_act": st.sampled_from(["gelu_new", "gelu", "relu", "silu", "quick_gelu"]),
        "qkv_bias": st.booleans(),
        "layer_norm_eps": st.sampled_from([1e-3, 1e-12]),
        "image_size": st.sampled_from([[8, 12], 8]),
        "patch_size": st.sampled_from([[4, 3], 4, 2]),
        "num_channels": st.sampled_from([3, 1]),
        "num_labels": st.sampled_from([5, 2, 1]),
        "pooler_act": st.sampled_from(["tanh", "relu"]),
        "pooler_output_size": st.sampled_from([7, None]),
    }
)


def make_peer(architecture, dtype="float32", pooler=True, **fields):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.ViTConfig(initializer_range=0.5, **fields)
    options = {} if pooler else {"add_pooling_layer": False}
    return perturbed(lambda: getattr(transformers, architecture)(config, **options), dtype)


def images_for(config, count=3):
    size = config.image_size
    shape = (count, *((size, size) if isinstance(size, int) else size), config.num_channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.peers
@pytest.mark.parametrize("architecture", HEADS)
# Every example compiles, so that shrinking one would take minutes.
@hypothesis.settings(max_examples=2, phases=[hypothesis.Phase.generate])
@hypothesis.given(fields=CONFIGS, pooler=st.booleans(), new=st.booleans())
def test_outputs_and_files_agree_with_transformers(architecture, fields, pooler, new, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("vit")
    fields["hidden_size"] = fields.pop("head_width") * fields["num_attention_heads"]
    peer = make_peer(architecture, pooler=pooler or architecture != "ViTModel", **fields)
    save_peer(peer, tmp_path / "peer", new_names=new)
    module, _ = converters.load(tmp_path / "peer")
    images = images_for(module.config)
    wants, gots = forward(peer, images), nnx.jit(lambda module: module(images))(module)
    gots = [got for got in gots if got is not None] if isinstance(gots, tuple) else [gots]
    assert len(gots) == len(wants) == (1 if architecture != "ViTModel" else 1 + pooler)
    for got, want in zip(gots, wants, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    converters.save(tmp_path / "ours", module)
    assert_same_bytes(tmp_path / "ours", tmp_path / "peer")
    options = {} if pooler or architecture != "ViTModel" else {"add_pooling_layer": False}
    again, info = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.id2label == peer.config.id2label
    for got, want in zip(forward(again.eval(), images), wants, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_to_its_precision(dtype, tmp_path):
    sizes = {"hidden_size": 12, "intermediate_size": 20, "image_size": 8, "patch_size": 4}
    peer = make_peer("ViTForImageClassification", dtype, True, **sizes, num_attention_heads=3, num_hidden_layers=2)
    save_peer(peer, tmp_path / "peer")
    module, _ = converters.load(tmp_path / "peer")
    images = images_for(module.config)
    got = np.asarray(nnx.jit(lambda module: module(images))(module), np.float32)
    want, exact = forward(peer, images)[0], forward(peer.float(), images)[0]
    # Both round after each operation, and so both are off the exact ones by about as much.
    allowed = 8 * float(jnp.finfo(dtype).eps) * abs(exact).max()
    assert abs(got - exact).max() < allowed
    assert abs(got - want).max() < allowed
    converters.save(tmp_path / "ours", module)
    assert_same_bytes(tmp_path / "ours", tmp_path / "peer")
