"""BEiT3: the encoder against torchscale's, the heads against their formulas in torch; bytes, files, shapes."""

import functools
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import converters
from converters.beit3 import MODELS, Config, resize_positions
from converters.loading import open_model
from tests.converters.torch_peers import import_torchscale

TINY = {
    "encoder_embed_dim": 8,
    "encoder_attention_heads": 2,
    "encoder_ffn_embed_dim": 12,
    "encoder_layers": 2,
    "img_size": 8,
    "patch_size": 4,
    "vocab_size": 11,
    "max_source_positions": 9,
}
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
TOKENS = RNG.integers(0, 11, size=(2, 5))
PADDING = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], bool)


@functools.cache
def encoder(**changes):
    """A random torchscale encoder with weights that are not small."""
    BEiT3, EncoderConfig = import_torchscale()
    import torch

    torch.manual_seed(0)
    options = {"multiway": True, "no_output_layer": True, "layernorm_embedding": False}
    model = BEiT3(EncoderConfig(**TINY | options | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def state_of(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def write(folder, tensors) -> None:
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, folder / "model.safetensors")


def assert_same_bytes(folder, tensors) -> None:
    back = converters.read_tensors(folder)
    assert {n: (a.shape, a.dtype, a.tobytes()) for n, a in back.items()} == {
        n: (a.shape, a.dtype, a.tobytes()) for n, a in tensors.items()
    }


def by_torchscale(model, **inputs) -> np.ndarray:
    import torch

    if inputs.get("visual_tokens") is not None:
        inputs["visual_tokens"] = inputs["visual_tokens"].transpose(0, 3, 1, 2)
    with torch.no_grad():
        found = model(**{k: None if v is None else torch.tensor(np.ascontiguousarray(v)) for k, v in inputs.items()})
    return found["encoder_out"].numpy()


@pytest.mark.peers
@pytest.mark.parametrize("changes", [{}, {"subln": False, "normalize_output": False, "activation_fn": "relu"}], ids=str)
def test_encoder_agrees_with_torchscale(changes, tmp_path):
    model = encoder(**changes)
    write(tmp_path / "there", state_of(model))
    module, params = converters.load(tmp_path / "there", config=Config(**TINY | changes))
    text, images = {"textual_tokens": TOKENS}, {"visual_tokens": IMAGES[:2]}
    masked = RNG.random((2, 4)) < 0.5
    cases = [
        (module(images=IMAGES[:2]), images),
        (module(TOKENS), text),
        (module(TOKENS, padding=PADDING), text | {"text_padding_position": PADDING}),
        (module(TOKENS, IMAGES[:2], PADDING), text | images | {"text_padding_position": PADDING}),
        (module(images=IMAGES[:2], masked=masked), images | {"vision_masked_position": masked}),
    ]
    for (features, split), inputs in cases:
        np.testing.assert_allclose(features, by_torchscale(model, **inputs), rtol=1e-5, atol=1e-5)
        assert split == (5 if "visual_tokens" in inputs else 0)
    converters.save(tmp_path / "back", params, module.config, architecture="torchscale/BEiT3")
    assert_same_bytes(tmp_path / "back", state_of(model))


def head_in_torch(name: str, features, split: int, tensors):
    """The head's formula in torch.nn.functional, on the encoder's features."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    t = {n: torch.tensor(a) for n, a in tensors.items()}

    def dense(x, of):
        return F.linear(x, t[f"{of}.weight"], t.get(f"{of}.bias"))

    def norm(x, of):
        return F.layer_norm(x, (x.shape[-1],), t[f"{of}.weight"], t[f"{of}.bias"])

    if name == "BEiT3ForImageClassification":
        return dense(norm(features[:, 1:].mean(1), "fc_norm"), "head")
    if name == "BEiT3ForVisualQuestionAnswering":
        x = torch.tanh(dense(norm(features[:, 0], "pooler.norm"), "pooler.dense"))
        return dense(F.gelu(norm(dense(x, "head.0"), "head.1")), "head.3")
    if name == "BEiT3ForVisualReasoning":
        pair = torch.cat([features[:, 0], features[:, split]], -1)
        x = norm(torch.cat(list(pair.chunk(2)), -1), "head.norm1")
        return dense(F.gelu(norm(dense(x, "head.dense1"), "head.norm2")), "head.dense2")
    assert name == "BEiT3ForCaptioning"
    return dense(features[:, split:], "mlm_head")


HEADS = {
    "BEiT3ForImageClassification": (
        lambda m: m(IMAGES[:2]),
        {"visual_tokens": IMAGES[:2]},
    ),
    "BEiT3ForVisualQuestionAnswering": (
        lambda m: m(TOKENS, IMAGES[:2], PADDING),
        {"textual_tokens": TOKENS, "visual_tokens": IMAGES[:2], "text_padding_position": PADDING},
    ),
    "BEiT3ForVisualReasoning": (
        lambda m: m(TOKENS, IMAGES[:2], IMAGES[2:], PADDING),
        {
            "textual_tokens": np.concatenate([TOKENS, TOKENS]),
            "visual_tokens": IMAGES,
            "text_padding_position": np.concatenate([PADDING, PADDING]),
        },
    ),
    "BEiT3ForCaptioning": (
        lambda m: m(TOKENS, IMAGES[:2], PADDING),
        {
            "textual_tokens": TOKENS,
            "visual_tokens": IMAGES[:2],
            "text_padding_position": PADDING,
            # 1 where attention is forbidden: what comes after, and the caption for the image.
            "attn_mask": np.block(
                [[np.zeros((5, 5)), np.ones((5, 5))], [np.zeros((5, 5)), np.triu(np.ones((5, 5)), 1)]]
            ),
        },
    ),
}


def random_model(name: str, **changes):
    config = Config(**TINY | {"num_classes": 3} | changes)
    graph, state = nnx.split(MODELS[f"torchscale/{name}"](config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.4, jnp.float32), state))


@pytest.mark.peers
@pytest.mark.parametrize("name", HEADS)
def test_heads_agree_with_their_formulas(name, tmp_path):
    torch = pytest.importorskip("torch")

    model = random_model(name)
    converters.save(tmp_path, model)
    tensors = converters.read_tensors(tmp_path)
    run, inputs = HEADS[name]
    body = encoder()
    before = {n: v.clone() for n, v in body.state_dict().items()}
    body.load_state_dict({n[6:]: torch.tensor(a) for n, a in tensors.items() if n.startswith("beit3.")})
    features = torch.tensor(by_torchscale(body, **inputs))
    body.load_state_dict(before)  # other tests share it
    with torch.no_grad():
        expected = head_in_torch(name, features, 5, tensors).numpy()
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
def test_retrieval_agrees_with_its_formula(tmp_path):
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    model = random_model("BEiT3ForRetrieval")
    converters.save(tmp_path, model)
    tensors = converters.read_tensors(tmp_path)
    assert tensors["logit_scale"].shape == ()
    image, text = model(TOKENS, IMAGES[:2], PADDING)
    for found, head, features in (
        (image, "vision_head", model.beit3(images=IMAGES[:2]).features),
        (text, "language_head", model.beit3(TOKENS, padding=PADDING).features),
    ):
        x = F.linear(torch.tensor(np.array(features[:, 0])), torch.tensor(tensors[f"{head}.weight"]))
        np.testing.assert_allclose(found, F.normalize(x, dim=-1).numpy(), rtol=1e-5, atol=1e-6)
    assert model(images=IMAGES).text is None


@pytest.mark.parametrize("name", [n.removeprefix("torchscale/") for n in MODELS])
def test_bytes_shapes_and_detection(name, tmp_path):
    """Files without a configuration: the tensors tell the architecture and the sizes. bfloat16 stays what it is."""
    model = random_model(name, normalize_output=name != "BEiT3ForImageClassification")
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    converters.save(tmp_path / "a", model)
    tensors = converters.read_tensors(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(converters.ConversionError, match=r"how many heads a BEiT3 of width 8 has.*--config FILE"):
        open_model(tmp_path / "a")
    heads = {"encoder_attention_heads": 2}
    opened = open_model(tmp_path / "a", config=heads)
    assert opened.entry.name == f"torchscale/{name}"
    classes = 3 if tensors.keys() & {"head.weight", "head.3.weight", "head.dense2.weight"} else 2
    normalized = name != "BEiT3ForImageClassification"
    assert opened.config == Config(**TINY, num_classes=classes, normalize_output=normalized)
    module, _ = converters.load(tmp_path / "a", config=heads)
    converters.save(tmp_path / "b", module)
    assert_same_bytes(tmp_path / "b", tensors)
    assert all(str(a.dtype) == "bfloat16" for a in tensors.values())


def test_prefix_of_the_encoder_is_put_on_or_taken_off(tmp_path):
    model = random_model("BEiT3")
    converters.save(tmp_path / "a", model)
    tensors = converters.read_tensors(tmp_path / "a")
    prefixed = {f"beit3.{n}": a for n, a in tensors.items()}
    write(tmp_path / "b", prefixed)
    module, _ = converters.load(tmp_path / "b", config=model.config)
    converters.save(tmp_path / "c", module)
    assert_same_bytes(tmp_path / "c", prefixed)
    np.testing.assert_array_equal(module(TOKENS).features, model(TOKENS).features)


@pytest.mark.peers
@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 7), (5, 2), (3, 3)])
def test_positions_are_resized_as_torch_does(old, new):
    torch = pytest.importorskip("torch")
    embedding = RNG.normal(size=(3 + old * old, 6)).astype(np.float32)
    grid = torch.tensor(embedding[3:]).reshape(1, old, old, 6).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    expected = resized.permute(0, 2, 3, 1).reshape(new * new, 6).numpy()
    found = resize_positions(embedding, new * new)
    np.testing.assert_array_equal(found[:3], embedding[:3])
    np.testing.assert_allclose(found[3:], expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_supported_says_why(tmp_path):
    with pytest.raises(converters.ConversionError, match="deepnorm is True"):
        Config.from_dict({"deepnorm": True})
    with pytest.raises(converters.ConversionError, match="heads do not divide"):
        Config(encoder_embed_dim=10, encoder_attention_heads=4)
    with pytest.raises(ValueError, match="no square"):
        resize_positions(np.zeros((3 + 5, 2)), 4)
    model = random_model("BEiT3")
    with pytest.raises(ValueError, match="tokens, images, or both"):
        model()
    write(tmp_path, {"encoder.layers.0.self_attn.q_proj.A.weight": np.zeros((2, 2))})
    with pytest.raises(converters.ConversionError, match="not a BEiT3") as caught:
        converters.load(tmp_path)
    assert "missing: vision_embed.proj.weight" in caught.value.problems


@pytest.mark.peers
@hypothesis.settings(max_examples=2, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
@hypothesis.given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    wide=st.integers(1, 3),
    patch=st.sampled_from([2, 4]),
    side=st.sampled_from([8, 12]),
    act=st.sampled_from(["gelu", "relu", "swish"]),
)
def test_random_configurations(layers, heads, wide, patch, side, act):
    changes = {"encoder_layers": layers, "encoder_embed_dim": 4 * heads * wide, "encoder_attention_heads": heads}
    changes |= {"patch_size": patch, "img_size": side, "activation_fn": act}
    images = RNG.normal(size=(2, side, side, 3)).astype(np.float32)
    model = encoder(**changes)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), state_of(model))
        module, _ = converters.load(folder, config={"encoder_attention_heads": heads, "activation_fn": act})
        features = module(TOKENS, images, PADDING).features
    inputs = {"textual_tokens": TOKENS, "visual_tokens": images, "text_padding_position": PADDING}
    np.testing.assert_allclose(features, by_torchscale(model, **inputs), rtol=1e-5, atol=1e-5)
