"""Vision Transformers of timm: outputs, bytes, both ways of telling the configuration, and opening what we wrote."""

import json
import re

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

import converters
from converters import ConversionError, vit
from converters.families import ARCHITECTURES, detect
from converters.loading import abstract, open_model
from converters.vit import MODELS, Config
from tests.converters.peer_models import assert_same_bytes, forward, perturbed, write
from tests.converters.torch_peers import import_timm

PLAIN, DISTILLED = "timm/VisionTransformer", "timm/VisionTransformerDistilled"
TINY = Config(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
    num_channels=1,
    layer_norm_eps=1e-6,
    labels=("LABEL_0", "LABEL_1", "LABEL_2"),
)


def changed(**fields):
    return Config.from_dict(TINY.to_dict() | fields)


def run(module, images):
    return np.asarray(nnx.jit(lambda module: module(images))(module), np.float32)


def images_for(config, count=3):
    height, width = np.broadcast_to(config.image_size, 2)
    return np.random.default_rng(0).normal(size=(count, height, width, config.num_channels)).astype(np.float32)


# What the tensors and the arguments of timm's VisionTransformer tell, and what has to be told.
VARIANTS = {
    "token": {},
    "average": {"global_pool": "avg", "final_norm": False, "fc_norm": True},
    "average_without_class_token": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 4, "no_embed_class": True, "layer_scale": True},
    "clip": {"pre_norm": True, "patch_bias": False, "qk_norm": True, "qkv_bias": False},
    "map": {"global_pool": "map", "class_token": False},
    "distilled": {"distilled": True},
    "features": {"id2label": {}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_tell_the_configuration(variant, tmp_path):
    config = changed(**VARIANTS[variant])
    name = DISTILLED if config.distilled else PLAIN
    module = MODELS[name](config, rngs=nnx.Rngs(0))
    converters.save(tmp_path / "with", module, architecture=name)
    raw = json.loads((tmp_path / "with" / "config.json").read_text())
    assert "architectures" not in raw
    assert open_model(tmp_path / "with").config == config
    tensors = converters.read_tensors(tmp_path / "with")
    assert detect({}, tensors).name == name
    bare = write(tmp_path / "without", tensors)
    if not config.qk_norm:  # whose shapes tell how wide a head is
        with pytest.raises(ConversionError, match=r"number of heads of a ViT of width 8.*--config FILE"):
            open_model(bare)
    opened = open_model(bare, config={"num_heads": 2})
    assert (opened.entry.name, opened.config) == (name, config)


def test_what_is_not_supported_says_why(tmp_path):
    module = MODELS[PLAIN](TINY, rngs=nnx.Rngs(0))
    converters.save(tmp_path / "vit", module, architecture=PLAIN)
    for raw, told in [
        ({"architecture": "vit_base_patch16_rpn_224"}, "vit_base_patch16_rpn_224 computes something else"),
        (
            {"model_args": {"norm_layer": "rmsnorm", "act_layer": "mish"}},
            "(?s)norm_layer is 'rmsnorm'.*act_layer is 'mish'",
        ),
        ({"num_heads": 2, "num_classes": 0, "global_pool": ""}, "global_pool is '', supported is None or 'token' or"),
        ({"num_heads": 2, "img_size": [8, 12]}, "pos_embed has 5 places, images of 8 by 12 need 6"),
        ({"num_heads": 2, "no_embed_class": True}, "pos_embed has 5 places, 1 tokens stand before"),
    ]:
        with pytest.raises(ConversionError, match=told):
            converters.load(tmp_path / "vit", config=raw)
    with pytest.raises(ConversionError, match="distilled is False"):
        converters.save(tmp_path / "new", module, architecture=DISTILLED)
    with pytest.raises(ConversionError, match="cannot hold this ViT:\n  layer_norm_eps is 1e-12"):
        converters.save(
            tmp_path / "new", MODELS[PLAIN](changed(layer_norm_eps=1e-12), rngs=nnx.Rngs(0)), architecture=PLAIN
        )
    averaging = MODELS[PLAIN](changed(global_pool="avg"), rngs=nnx.Rngs(0))
    with pytest.raises(ConversionError, match="global_pool is 'avg', there it is always 'token'"):
        converters.save(tmp_path / "new", averaging, architecture="ViTForImageClassification")
    for fields in ({"class_token": False}, {"global_pool": "prr"}, {"distilled": True, "fc_norm": True}):
        with pytest.raises(ConversionError, match="this ViT configuration is not supported"):
            changed(**fields)


def test_missing_and_extra_tensors_are_named_at_once(tmp_path):
    converters.save(tmp_path / "vit", MODELS[PLAIN](TINY, rngs=nnx.Rngs(0)), architecture=PLAIN)
    tensors = dict(converters.read_tensors(tmp_path / "vit"))
    del tensors["blocks.1.attn.qkv.weight"]
    tensors["blocks.0.mlp.norm.weight"] = np.ones(12, np.float32)
    with pytest.raises(ConversionError) as caught:
        converters.load(write(tmp_path / "bad", tensors), config={"num_heads": 2})
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.norm.weight"):
        assert name in str(caught.value)
    with pytest.raises(ConversionError, match=r"missing: pos_embed"):
        converters.load(write(tmp_path / "worse", {n: a for n, a in tensors.items() if n != "pos_embed"}))


def test_between_the_layouts_of_timm_and_transformers(tmp_path):
    module = MODELS["ViTForImageClassification"](TINY, rngs=nnx.Rngs(0))
    converters.save(tmp_path / "face", module)
    converters.convert(tmp_path / "face", tmp_path / "timm", to="torch", architecture=PLAIN)
    tensors = converters.read_tensors(tmp_path / "timm")
    key = np.asarray(module.vit.encoder.layer[1].attention.attention.key.kernel[...])
    np.testing.assert_array_equal(tensors["blocks.1.attn.qkv.weight"][8:16], key.T)
    converters.convert(tmp_path / "timm", tmp_path / "back", to="torch", architecture="ViTForImageClassification")
    assert_same_bytes(tmp_path / "back", tmp_path / "face")
    images = images_for(TINY)
    again = converters.load(tmp_path / "back")[0]
    assert again.config == TINY
    np.testing.assert_array_equal(run(again, images), run(converters.load(tmp_path / "timm")[0], images))


def test_a_layer_before_the_classifier(tmp_path):
    """timm dropped `representation_size`; files that have it are still about."""
    config = changed(representation_size=6)
    module = MODELS[PLAIN](config, rngs=nnx.Rngs(0))
    names = converters.to_torch(module, vit.table(config, PLAIN))
    assert names["pre_logits.fc.weight"].shape == (6, 8)
    again, _ = converters.load(write(tmp_path / "vit", names), config={"num_heads": 2})
    images = images_for(config)
    features = module.vit(jnp.asarray(images))[:, 0]
    want = jnp.tanh(features @ names["pre_logits.fc.weight"].T) @ names["head.weight"].T
    np.testing.assert_allclose(again(images), want, rtol=1e-5, atol=1e-6)


# --- against timm -----------------------------------------------------------------------------------------------------

# The first of each is what hypothesis tries first: the example that has most in it.
POOLS = st.sampled_from(
    [
        {"global_pool": "token"},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False, "class_token": False},
        {"global_pool": "map", "class_token": False},
        {"global_pool": "avgmax"},
        {"global_pool": "max", "fc_norm": False},
        {"global_pool": "token", "final_norm": False},
    ]
)
ARGUMENTS = st.fixed_dictionaries(
    {
        "img_size": st.sampled_from([(8, 12), 8]),
        "patch_size": st.sampled_from([4, 2]),
        "in_chans": st.sampled_from([3, 1]),
        "num_classes": st.sampled_from([5, 0]),
        "depth": st.sampled_from([2, 1]),
        "num_heads": st.sampled_from([3, 1]),
        "mlp_ratio": st.sampled_from([1.5, 4.0]),
        "qkv_bias": st.booleans(),
        "qk_norm": st.booleans(),
        "init_values": st.sampled_from([0.3, None]),
        "no_embed_class": st.booleans(),
        "reg_tokens": st.sampled_from([0, 2]),
        "pre_norm": st.booleans(),
        "act_layer": st.sampled_from([None, "gelu_tanh", "quick_gelu", "relu", "silu"]),
    }
)


def check_both_ways(peer, tmp_path, tolerance=1e-5, **options):
    """Outputs, bytes, and that timm opens what we wrote."""
    module, _ = converters.load(tmp_path / "peer", **options)
    images = images_for(module.config)
    want = forward(peer, images)[0]
    np.testing.assert_allclose(run(module, images), want, rtol=tolerance, atol=tolerance)
    converters.save(tmp_path / "ours", module)
    assert_same_bytes(tmp_path / "ours", tmp_path / "peer")
    again = import_timm().create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    np.testing.assert_array_equal(forward(again.to(next(peer.parameters()).dtype), images)[0], want)
    return module


@pytest.mark.peers
# Every example compiles, so that shrinking one would take minutes.
@hypothesis.settings(max_examples=4, phases=[hypothesis.Phase.generate])
@hypothesis.given(arguments=ARGUMENTS, pool=POOLS, told=st.booleans())
def test_outputs_and_files_agree_with_timm(arguments, pool, told, tmp_path_factory):
    timm = import_timm()
    tmp_path = tmp_path_factory.mktemp("timm")
    arguments = {"embed_dim": 4 * arguments["num_heads"]} | arguments | pool
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if told:
        peer = perturbed(lambda: timm.create_model("vit_tiny_patch16_224", **arguments))
        timm.models._hub.save_for_hf(peer, tmp_path / "peer", safe_serialization=True)
        check_both_ways(peer, tmp_path)
        theirs, ours = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("peer", "ours"))
        assert theirs | {"dtype": "float32"} == ours
    else:
        peer = perturbed(lambda: timm.models.vision_transformer.VisionTransformer(**arguments))
        write(tmp_path / "peer", {n: t.numpy() for n, t in peer.state_dict().items()})
        shown = ("num_heads", "act_layer", "img_size", "global_pool", "no_embed_class")
        check_both_ways(peer, tmp_path, config={name: arguments[name] for name in shown if name in arguments})


@pytest.mark.peers
@pytest.mark.parametrize("classes", [3, 0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distilled_models_agree_with_timm(classes, dtype, tmp_path):
    timm = import_timm()
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": classes}
    peer = perturbed(lambda: timm.create_model("deit_tiny_distilled_patch16_224", **sizes), dtype)
    timm.models._hub.save_for_hf(peer, tmp_path / "peer", safe_serialization=True)
    check_both_ways(peer, tmp_path, 1e-5 if dtype == "float32" else 0.1)


NEEDED = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")


@pytest.mark.peers
def test_every_variant_of_timm_is_read_right_or_refused():
    """Heads, activation, epsilon, pooling from the variants' names and shapes alone; those of other modules refused."""
    timm = import_timm()
    import torch

    read, refused = [], []
    for name in timm.list_models(["vit_*", "deit*", "flexivit_*", "test_vit*"]):
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        if module == "eva":  # whose tensors may have the same names
            with pytest.raises(ConversionError, match="computes something else"):
                vit.configure({"architecture": name}, dict.fromkeys(NEEDED, (1,)), PLAIN)
        if module not in ("vision_transformer", "deit"):
            continue
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        architecture = DISTILLED if "dist_token" in shapes else PLAIN
        raw = {"architecture": name, "pretrained_cfg": {"input_size": model.pretrained_cfg["input_size"]}}
        block = model.blocks[0]
        parts = [block, *(getattr(block, part, None) for part in ("attn", "mlp", "norm1"))]
        ours = [type(part).__name__ for part in parts] == ["Block", "Attention", "Mlp", "LayerNorm"]
        try:
            config = vit.configure(raw, shapes, architecture)
            entry = ARCHITECTURES[architecture]
            expect = None if ours else abstract(vit, config, entry)  # which takes its time
            tensors = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
            converters.to_flax(tensors, vit.table(config, architecture), expect=expect)
        except ConversionError:
            refused.append(name)
            continue
        assert ours, name
        assert config.num_attention_heads == block.attn.num_heads, name
        assert config.layer_norm_eps == block.norm1.eps == getattr(model.norm, "eps", block.norm1.eps), name
        assert config.global_pool == model.global_pool, name
        assert config.hidden_act == _activation(block.mlp.act), name
        assert config.no_embed_class == (model.no_embed_class and config.prefix_tokens > 0), name
        assert not model.pool_include_prefix, name
        read.append(name)
    assert len(read) > 120
    other = "_rpn_|rope|^vit_pe_|_18x2_|_xp_|wee_|_d?little|giant_patch14_(reg4_|reg1_)?(dinov2|tipsv2)|test_vit[34]"
    assert [name for name in refused if not re.search(other, name)] == []


def _activation(layer):
    name = type(layer).__name__
    if name == "GELU" and getattr(layer, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    return {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}[name]
