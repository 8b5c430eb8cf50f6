"""Google's archives of Vision Transformers: against timm's reader of them, there and back, what they cannot hold."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import converters
from converters import ConversionError, vit
from converters.families import ARCHITECTURES, detect
from converters.files import npz
from converters.loading import abstract, open_model
from converters.mapping import Row, flatten, nest, to_flax, to_torch
from tests.converters.peer_models import assert_same_bytes, forward
from tests.converters.torch_peers import import_timm

FIELDS = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "hidden_act": "gelu_pytorch_tanh",
    "image_size": 8,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
    "id2label": {str(i): f"LABEL_{i}" for i in range(5)},
}
OLD, NEW = "vit_jax/ViT", "big_vision/ViT"
AVERAGE = {"class_token": False, "global_pool": "avg"}
CASES = {
    "token": (OLD, {}),
    "average": (OLD, AVERAGE),
    "representation": (OLD, {"representation_size": 6}),
    "new_token": (NEW, {"no_embed_class": True}),
    "new_average": (NEW, AVERAGE | {"patch_size": (4, 2), "image_size": (16, 8)}),
    "new_map": (NEW, {"class_token": False, "global_pool": "map"}),
}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def random_archive(path, case, dtype: Any = np.float32, prefix=""):
    """A random archive, its architecture, and what configuration it is of."""
    name, fields = CASES[case]
    config = vit.Config.from_dict(FIELDS | fields)
    rng = np.random.default_rng(1)
    shapes = flatten(abstract(vit, config, ARCHITECTURES[name]))
    tree = nest({p: (0.4 * rng.normal(size=leaf.shape)).astype(dtype) for p, leaf in shapes.items()})
    tensors = to_torch(tree, vit.table(config, name))
    npz.write(path, {f"{prefix}{n}": array for n, array in tensors.items()})
    return tensors, name, config


def run(module, images):
    return np.asarray(nnx.jit(lambda module: module(images))(module))


@pytest.mark.parametrize("case", CASES)
def test_an_archive_comes_back(case, tmp_path):
    tensors, name, config = random_archive(tmp_path / "vit.npz", case)
    block = "Transformer/encoderblock_1/MultiHeadDotProductAttention_" + ("1" if name == OLD else "0")
    assert tensors[f"{block}/query/kernel"].shape == (12, 3, 4)
    assert tensors[f"{block}/out/kernel"].shape == (3, 4, 12)
    assert detect({}, tensors).name == name
    module, _ = converters.load(tmp_path / "vit.npz")
    assert module.config == config
    query = module.vit.encoder.layer[1].attention.attention.query.kernel[...]
    np.testing.assert_array_equal(query, tensors[f"{block}/query/kernel"].reshape(12, 12))
    converters.save(tmp_path / "back", module, to="flax", format="npz")
    assert_same_bytes(dict(np.load(tmp_path / "back" / "model.npz")), tensors)
    assert converters.load(tmp_path / "back")[0].config == config


def test_bfloat16_and_an_optimiser_in_front(tmp_path):
    import ml_dtypes

    tensors, name, _ = random_archive(tmp_path / "half.npz", "token", ml_dtypes.bfloat16, "opt/target/")
    module, params = converters.load(tmp_path / "half.npz")
    assert module.origin.architecture == name
    assert params["classifier"]["kernel"].dtype == jnp.bfloat16
    converters.save(tmp_path / "back", module, to="flax", format="npz")
    back = {n: np.asarray(leaf) for n, leaf in npz.read(tmp_path / "back" / "model.npz").items()}
    assert_same_bytes(back, {f"opt/target/{n}": array for n, array in tensors.items()})


def test_what_is_wrong_is_named(tmp_path):
    tensors, _, _ = random_archive(tmp_path / "vit.npz", "token")
    block = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/"
    bad = dict(tensors)
    bad[f"{block}key/kernel"] = bad[f"{block}key/kernel"].reshape(12, 2, 6)
    del bad[f"{block}value/bias"]
    npz.write(tmp_path / "bad.npz", bad)
    with pytest.raises(ConversionError) as caught:
        converters.load(tmp_path / "bad.npz")
    for told in (f"{block}key/kernel (12, 2, 6), the model has (12, 3, 4)", f"missing: {block}value/bias"):
        assert any(told in line for line in caught.value.problems), told
    del bad["embedding/kernel"]
    npz.write(tmp_path / "worse.npz", bad)
    with pytest.raises(ConversionError, match="missing, or of other axes: embedding/kernel"):
        converters.load(tmp_path / "worse.npz")
    module, _ = converters.load(tmp_path / "vit.npz")
    with pytest.raises(ConversionError, match="no_embed_class is False"):
        converters.save(tmp_path / "new", module, architecture=NEW, to="flax", format="npz")


def test_fields_may_be_given_and_the_way_to_transformers(tmp_path):
    _, _, config = random_archive(tmp_path / "vit.npz", "token")
    opened = open_model(tmp_path / "vit.npz", config={"hidden_act": "gelu"})
    assert (opened.config.hidden_act, opened.config.hidden_size) == ("gelu", 12)
    converters.convert(tmp_path / "vit.npz", tmp_path / "face", to="torch")
    module, _ = converters.load(tmp_path / "face")
    assert (module.origin.architecture, module.config) == ("ViTForImageClassification", config)
    np.testing.assert_array_equal(run(module, IMAGES), run(converters.load(tmp_path / "vit.npz")[0], IMAGES))
    random_archive(tmp_path / "map.npz", "new_map")
    with pytest.raises(ConversionError, match="ViTForImageClassification cannot hold this ViT"):
        converters.convert(tmp_path / "map.npz", tmp_path / "no", to="torch")
    assert not (tmp_path / "no").exists()


def test_a_tensor_of_another_shape_has_no_place_of_its_own_in_a_merge():
    rows = (Row("w", "k", shapes=((2, 3, 4), (2, 12))), Row("b", "c"))
    tensor = np.arange(24).reshape(2, 3, 4)
    tree = to_flax({"w": tensor, "b": np.zeros(2)}, rows)
    np.testing.assert_array_equal(tree["k"], tensor.reshape(2, 12))
    np.testing.assert_array_equal(to_torch(tree, rows)["w"], tensor)
    place = converters.layout(rows)
    assert (place("k"), place("c")) == (("k", None), ("b", None))
    assert converters.fused(rows) == {"w": ("k",)}


@pytest.mark.peers
@pytest.mark.parametrize("case", [case for case in CASES if case != "representation"])  # which timm has not
def test_timm_reads_the_same_model(case, tmp_path):
    timm = import_timm()
    _, _, config = random_archive(tmp_path / "vit.npz", case)
    module, _ = converters.load(
        tmp_path / "vit.npz", config={"image_size": list(np.broadcast_to(config.image_size, 2))}
    )
    peer = timm.models.vision_transformer.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=12,
        depth=2,
        num_heads=3,
        mlp_ratio=20 / 12,
        num_classes=5,
        act_layer="gelu_tanh",
        global_pool=config.global_pool,
        class_token=config.class_token,
        no_embed_class=config.no_embed_class,
        fc_norm=False,
    )
    timm.models.vision_transformer._load_weights(peer.requires_grad_(False), str(tmp_path / "vit.npz"))
    height, width = np.broadcast_to(config.image_size, 2)
    images = np.random.default_rng(2).normal(size=(2, height, width, 3)).astype(np.float32)
    np.testing.assert_allclose(run(module, images), forward(peer.eval(), images)[0], rtol=1e-5, atol=1e-5)
