"""BEiT: against transformers, byte for byte, buffers of older files, relative positions."""

import json

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

import converters
from converters import ConversionError, beit
from converters.beit.positions import relative_position_index
from converters.families import detect
from converters.mapping import flatten
from tests.converters.peer_models import assert_same_bytes, forward, perturbed, save_peer, write

HEADS = tuple(beit.MODELS)
TINY = beit.Config(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
    num_channels=1,
    vocab_size=9,
    use_mask_token=True,
    use_absolute_position_embeddings=True,
    use_relative_position_bias=True,
    use_shared_relative_position_bias=True,
    labels=("odd", "even", "neither"),
)


def random_tensors(architecture, config=TINY):
    rng = np.random.default_rng(0)
    shapes = nnx.eval_shape(lambda: beit.MODELS[architecture](config, rngs=nnx.Rngs(0)))
    tree = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in flatten(shapes).items()}
    return converters.to_torch(converters.mapping.nest(tree), beit.table(config, architecture))


def run(module, images, masked=None):
    arguments = () if masked is None else (masked,)
    out = nnx.jit(lambda module: module(images, *arguments))(module)
    found = [part for part in out if part is not None] if isinstance(out, tuple) else [out]
    return [np.asarray(part, np.float32) for part in found]


def inputs_for(config, count=2):
    height, width = np.broadcast_to(config.image_size, 2)
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, height, width, config.num_channels)).astype(np.float32), (
        rng.random((count, config.patches)) < 0.5
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (3, 2)])
def test_relative_positions_one_pair_after_the_other(height, width):
    index = relative_position_index(height, width)
    places = [(y, x) for y in range(height) for x in range(width)]
    distances = (2 * height - 1) * (2 * width - 1)
    for a in range(-1, len(places)):
        for b in range(-1, len(places)):
            if a < 0 or b < 0:
                want = distances + (2 if a == b else 0 if a < 0 else 1)
            else:
                down, right = places[a][0] - places[b][0], places[a][1] - places[b][1]
                want = (down + height - 1) * (2 * width - 1) + right + width - 1
            assert index[a + 1, b + 1] == want


@pytest.mark.parametrize("architecture", HEADS)
def test_older_files_with_numbers_of_positions_come_back(architecture, tmp_path):
    """As transformers 4 wrote them; and with a configuration that does not name the architecture."""
    tensors = random_tensors(architecture)
    prefix = "" if architecture == "BeitModel" else "beit."
    for place in ("layer.0.attention.attention.", "layer.1.attention.attention.", ""):
        name = f"{prefix}encoder.{place}relative_position_bias.relative_position_index"
        tensors[name] = relative_position_index(2, 2)
    raw = {name: value for name, value in TINY.to_dict().items() if name != "architectures"}
    module, _ = converters.load(write(tmp_path / "old", tensors, raw))
    assert type(module) is beit.MODELS[architecture]
    converters.save(tmp_path / "again", module)
    assert_same_bytes(tmp_path / "again", tensors)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [architecture]
    assert converters.load(tmp_path / "again")[0].config == TINY
    tensors[name] = tensors[name] + 1
    with pytest.raises(ConversionError, match="relative_position_index"):
        converters.load(write(tmp_path / "bad", tensors, raw))


def test_what_is_wrong_is_named_all_at_once(tmp_path):
    tensors = random_tensors("BeitForImageClassification")
    assert detect({}, tensors).name == "BeitForImageClassification"
    del tensors["beit.encoder.layer.1.lambda_2"]
    tensors["beit.encoder.layer.0.attention.attention.key.bias"] = np.zeros(8, np.float32)
    tensors["classifier.weight"] = np.zeros((3, 9), np.float32)
    with pytest.raises(ConversionError) as caught:
        converters.load(write(tmp_path / "bad", tensors, TINY.to_dict()))
    assert len(caught.value.problems) == 3
    for name in ("layer.1.lambda_2", "layer.0.attention.attention.key.bias", "classifier.weight"):
        assert name in str(caught.value)
    with pytest.raises(ConversionError, match=r"there is no config\.json; it has to be that of a BEiT"):
        converters.load(write(tmp_path / "alone", tensors))


def test_unsupported_configurations_say_why():
    fields = {"use_absolute_position_embeddings": True, "use_relative_position_bias": True, "hidden_act": "mish"}
    with pytest.raises(ConversionError, match="this Beit configuration is not supported") as caught:
        beit.Config.from_dict(fields | {"image_size": [8, 12], "patch_size": [4, 3]})
    assert len(caught.value.problems) == 3
    module = nnx.eval_shape(lambda: beit.MODELS["BeitModel"](beit.Config(num_hidden_layers=1), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="use_mask_token is false"):
        nnx.eval_shape(lambda m: m(jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 196), bool)), module)


def test_trees_of_transformers_4():
    """The paths are those of FlaxBeitForImageClassification."""
    config = beit.Config.from_dict(TINY.to_dict())
    paths = flatten(nnx.eval_shape(lambda: beit.MODELS["BeitForImageClassification"](config, rngs=nnx.Rngs(0))))
    for path in (
        "beit/embeddings/mask_token",
        "beit/encoder/layer/1/attention/attention/relative_position_bias/relative_position_bias_table",
        "beit/encoder/relative_position_bias/relative_position_bias_table",
        "beit/encoder/layer/0/lambda_1",
        "beit/pooler/layernorm/scale",
        "classifier/kernel",
    ):
        assert path in paths
    assert "beit/encoder/layer/0/attention/attention/key/bias" not in paths


# --- against transformers ---------------------------------------------------------------------------------------------

# The first of each is what hypothesis tries first: the example that has most in it.
CONFIGS = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.sampled_from([2, 1]),
        "num_attention_heads": st.sampled_from([3, 1]),
        "intermediate_size": st.sampled_from([20, 5]),
        "hidden_act": st.sampled_from(["gelu_new", "gelu", "relu"]),
        "layer_norm_eps": st.sampled_from([1e-3, 1e-12]),
        "image_size": st.sampled_from([8, [8, 12]]),
        "patch_size": st.sampled_from([4, 2]),
        "num_channels": st.sampled_from([3, 1]),
        "num_labels": st.sampled_from([5, 2]),
        "use_absolute_position_embeddings": st.booleans(),
        "use_relative_position_bias": st.sampled_from([True, False]),
        "use_shared_relative_position_bias": st.booleans(),
        "layer_scale_init_value": st.sampled_from([0.3, 0.0]),
        "use_mean_pooling": st.booleans(),
        "use_mask_token": st.sampled_from([True, False]),
    }
)


def make_peer(architecture, dtype="float32", pooler=True, **fields):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.BeitConfig(initializer_range=0.5, vocab_size=11, **fields)
    options = {} if pooler else {"add_pooling_layer": False}
    return perturbed(lambda: getattr(transformers, architecture)(config, **options), dtype)


@pytest.mark.peers
@pytest.mark.parametrize("architecture", HEADS)
# Every example compiles, so that shrinking one would take minutes.
@hypothesis.settings(max_examples=2, phases=[hypothesis.Phase.generate])
@hypothesis.given(fields=CONFIGS, pooler=st.booleans(), new=st.booleans())
def test_outputs_and_files_agree_with_transformers(architecture, fields, pooler, new, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("beit")
    fields["hidden_size"] = 4 * fields["num_attention_heads"]
    if fields["image_size"] != 8:  # transformers resizes learned positions to squares only
        fields["use_absolute_position_embeddings"] = False
    peer = make_peer(architecture, pooler=pooler or architecture != "BeitModel", **fields)
    save_peer(peer, tmp_path / "peer", new_names=new)
    module, _ = converters.load(tmp_path / "peer")
    images, masked = inputs_for(module.config)
    masks = fields["use_mask_token"] and architecture != "BeitForImageClassification"
    wants = forward(peer, images, **({"bool_masked_pos": masked} if masks else {}))
    gots = run(module, images, masked if masks else None)
    if architecture == "BeitModel" and not pooler and not fields["use_mean_pooling"]:
        del gots[1]  # the class token, which no weight of a pooler tells of
    for got, want in zip(gots, wants, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    converters.save(tmp_path / "ours", module)
    assert_same_bytes(tmp_path / "ours", tmp_path / "peer")
    options = {} if pooler or architecture != "BeitModel" else {"add_pooling_layer": False}
    again, info = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if architecture == "BeitForMaskedImageModeling" and not fields["use_mean_pooling"]:
        # transformers 5.23 takes the two normalisations of its own old names for each other.
        peer = type(peer).from_pretrained(tmp_path / "peer").eval()
    for got, want in zip(forward(again.eval(), images), forward(peer, images), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.peers
def test_bfloat16_agrees_to_its_precision(tmp_path):
    fields = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 20}
    relative = {"use_relative_position_bias": True, "image_size": [8, 12], "patch_size": 4}
    peer = make_peer("BeitForImageClassification", "bfloat16", True, **fields, **relative)
    save_peer(peer, tmp_path / "peer")
    module, _ = converters.load(tmp_path / "peer")
    images, _ = inputs_for(module.config)
    (got,), (want,), (exact,) = run(module, images), forward(peer, images), forward(peer.float(), images)
    # Both round after each operation, and so both are off the exact ones by about as much.
    allowed = 8 * float(jnp.finfo("bfloat16").eps) * abs(exact).max()
    assert abs(got - exact).max() < allowed
    assert abs(got - want).max() < allowed
    converters.save(tmp_path / "ours", module)
    assert_same_bytes(tmp_path / "ours", tmp_path / "peer")
