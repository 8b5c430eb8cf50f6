"""CLIP: against transformers and torch's own fused attention, byte for byte, both layouts."""

import functools
import tempfile

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import converters
from converters.clip import MODELS, Config, TextConfig, VisionConfig
from converters.loading import open_model

TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 7,
    "projection_dim": 6,
    "eos_token_id": 19,
}
VISION = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 6,
}
HUGGING_FACE = [name for name in MODELS if "/" not in name]
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
TOKENS = np.array([[3, 5, 19, 1, 1, 1, 1], [2, 7, 8, 4, 9, 19, 1]])
MASK = np.array([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])


@functools.cache
def of_transformers(name: str, **changes):
    """A random model of transformers with weights that are not small, so that a wrong one shows."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = TEXT | {k: v for k, v in changes.items() if k in TEXT or k == "hidden_act"}
    vision = VISION | {k: v for k, v in changes.items() if k == "hidden_act"}
    text["bos_token_id"] = 0
    config = {
        "Text": lambda: transformers.CLIPTextConfig(**text),
        "Vision": lambda: transformers.CLIPVisionConfig(**vision),
        "": lambda: transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6, num_labels=3),
    }["Text" if "Text" in name else "Vision" if "Vision" in name else ""]()
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def outputs(model, images=IMAGES) -> list[np.ndarray]:
    """What a model of transformers gives for the images and the texts."""
    import torch

    inputs = {}
    if "Text" not in type(model).__name__:
        inputs["pixel_values"] = torch.tensor(images.transpose(0, 3, 1, 2)).to(model.dtype)
    if "Text" in type(model).__name__ or type(model).__name__ == "CLIPModel":
        inputs |= {"input_ids": torch.tensor(TOKENS), "attention_mask": torch.tensor(MASK)}
    with torch.no_grad():
        out = model(**inputs)
    names = ("logits_per_image", "image_embeds", "text_embeds", "logits", "last_hidden_state", "pooler_output")
    found = {n: getattr(out, n).float().numpy() for n in names if getattr(out, n, None) is not None}
    if "Projection" in type(model).__name__:
        return [found["text_embeds" if "Text" in type(model).__name__ else "image_embeds"]]
    return list(found.values())


def ours(module, images=IMAGES) -> list[np.ndarray]:
    name = type(module).__name__
    if name == "CLIPModel":
        out = module(TOKENS, images, MASK)
        return [out.logits_per_image, out.image_embeds, out.text_embeds]
    out = module(TOKENS, MASK) if "Text" in name else module(images)
    return list(out) if isinstance(out, tuple) else [out]


def described(tensors) -> dict:
    return {name: (a.shape, a.dtype, a.tobytes()) for name, a in tensors.items()}


def assert_agree(found, expected, tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=tolerance, atol=tolerance)


@pytest.mark.peers
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_logits_bytes_and_files_agree_with_transformers(name, tmp_path):
    model = of_transformers(name)
    model.save_pretrained(tmp_path / "there")
    module, params = converters.load(tmp_path / "there")
    assert_agree(ours(module), outputs(model), 1e-5)
    converters.save(tmp_path / "back", params, module.config, architecture=name)
    before, after = (converters.read_tensors(tmp_path / d) for d in ("there", "back"))
    assert described(before) == described(after)
    again = type(model).from_pretrained(tmp_path / "back").eval()
    assert_agree(outputs(again), outputs(model), 0)


@pytest.mark.peers
@pytest.mark.parametrize(("act", "eos"), [("gelu", 2), ("quick_gelu", 19)])
def test_activations_and_the_old_end_of_text(act, eos, tmp_path):
    model = of_transformers("CLIPModel", hidden_act=act, eos_token_id=eos)
    model.save_pretrained(tmp_path)
    assert_agree(ours(converters.load(tmp_path)[0]), outputs(model), 1e-5)


@pytest.mark.peers
def test_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")

    model = of_transformers("CLIPModel", layers=2)
    expected = outputs(model)
    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).save_pretrained(tmp_path / "there")
    module, _ = converters.load(tmp_path / "there")
    assert module.vision_model.post_layernorm.scale[...].dtype == jnp.bfloat16
    assert_agree(ours(module), expected, 0.1)
    converters.save(tmp_path / "back", module)
    before, after = (converters.read_tensors(tmp_path / d) for d in ("there", "back"))
    assert before.keys() == after.keys()
    assert all(before[n].tobytes() == after[n].tobytes() for n in before)


def random_model(**changes):
    config = Config(TextConfig(**TEXT | changes), VisionConfig(**VISION), projection_dim=6)
    graph, state = nnx.split(MODELS["CLIPModel"](config, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda a: jnp.asarray(RNG.normal(size=a.shape) * 0.3, jnp.float32), state)
    return nnx.merge(graph, state)


def test_openai_layout_and_back(tmp_path):
    """Between the layouts without loss; what OpenAI's files hold besides comes back as well."""
    module = random_model()
    converters.save(tmp_path / "openai", module, architecture="openai/CLIP")
    tensors = converters.read_tensors(tmp_path / "openai")
    assert tensors["visual.transformer.resblocks.0.attn.in_proj_weight"].shape == (36, 12)
    assert tensors["text_projection"].shape == (8, 6)
    q = np.asarray(module.text_model.encoder.layers[1].self_attn.q_proj.kernel[...])
    np.testing.assert_array_equal(tensors["transformer.resblocks.1.attn.in_proj_weight"][:8], q.T)
    tensors = dict(tensors, input_resolution=np.array(8), context_length=np.array(7), vocab_size=np.array(20))
    (tmp_path / "openai" / "config.json").unlink()
    safetensors.numpy.save_file(tensors, tmp_path / "openai" / "model.safetensors")
    config = Config(TextConfig(**TEXT), VisionConfig(**VISION), projection_dim=6)
    again, _ = converters.load(tmp_path / "openai", config=config)
    assert_agree(ours(again), ours(module), 0)
    converters.save(tmp_path / "back", again)
    back = converters.read_tensors(tmp_path / "back")
    assert described(back) == described(tensors)
    converters.save(tmp_path / "face", again, architecture="CLIPModel")
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in converters.read_tensors(tmp_path / "face")


def test_openai_shapes_tell_the_configuration(tmp_path):
    """All but the heads, where a width is not one of OpenAI's; what is given goes before what is told."""
    converters.save(tmp_path / "openai", random_model(), architecture="openai/CLIP")
    (tmp_path / "openai" / "config.json").unlink()
    with pytest.raises(converters.ConversionError, match=r"how many heads a tower of width 8 has.*--config FILE"):
        open_model(tmp_path / "openai")
    given = {
        "text_config": {"num_attention_heads": 2},
        "vision_config": {"num_attention_heads": 3, "hidden_act": "gelu"},
    }
    opened = open_model(tmp_path / "openai", config=given)
    assert opened.entry.name == "openai/CLIP"
    assert opened.config.vision == VisionConfig(**VISION | {"hidden_act": "gelu"})
    assert opened.config.text == TextConfig(**TEXT | {"eos_token_id": 2})


def test_openclip_names_with_a_text_prefix(tmp_path):
    module = random_model()
    converters.save(tmp_path / "a", module, architecture="openai/CLIP")
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    tensors = converters.read_tensors(tmp_path / "a")
    renamed = {f"text.{n}" if n.startswith(text) else n: a for n, a in tensors.items()}
    (tmp_path / "b").mkdir()
    safetensors.numpy.save_file(renamed, tmp_path / "b" / "model.safetensors")
    config = Config(TextConfig(**TEXT), VisionConfig(**VISION), projection_dim=6)
    again, _ = converters.load(tmp_path / "b", config=config)
    assert_agree(ours(again), ours(module), 0)


@pytest.mark.peers
def test_fused_attention_is_torchs(tmp_path):
    """The fused weights of the OpenAI layout in torch.nn.MultiheadAttention give what our layer gives."""
    torch = pytest.importorskip("torch")
    module = random_model()
    converters.save(tmp_path, module, architecture="openai/CLIP")
    tensors = converters.read_tensors(tmp_path)
    prefix = "transformer.resblocks.0.attn."
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    attention.load_state_dict({n[len(prefix) :]: torch.tensor(a) for n, a in tensors.items() if n.startswith(prefix)})
    x = RNG.normal(size=(2, 7, 8)).astype(np.float32)
    causal = torch.triu(torch.full((7, 7), -torch.inf), 1)
    with torch.no_grad():
        expected = attention(*[torch.tensor(x)] * 3, attn_mask=causal, need_weights=False)[0].numpy()
    layer = module.text_model.encoder.layers[0].self_attn
    mask = jnp.tril(jnp.ones((7, 7), bool))[None, None]
    np.testing.assert_allclose(layer(jnp.asarray(x), mask), expected, rtol=1e-5, atol=1e-5)


def test_old_files_with_prefixes_and_position_numbers(tmp_path):
    """transformers 4 wrote a tower's prefix, and position numbers."""
    config = Config(vision=VisionConfig(**VISION))
    module = MODELS["CLIPVisionModel"](config, rngs=nnx.Rngs(0))
    converters.save(tmp_path / "new", module)
    tensors = converters.read_tensors(tmp_path / "new")
    assert "embeddings.class_embedding" in tensors
    old = {f"vision_model.{n}": a for n, a in tensors.items()}
    old["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    safetensors.numpy.save_file(old, tmp_path / "old" / "model.safetensors")
    again, _ = converters.load(tmp_path / "old")
    assert_agree(ours(again), ours(module), 0)
    converters.save(tmp_path / "back", again)
    assert described(converters.read_tensors(tmp_path / "back")) == described(old)
    old["vision_model.embeddings.position_ids"] += 1
    safetensors.numpy.save_file(old, tmp_path / "old" / "model.safetensors")
    with pytest.raises(converters.ConversionError, match="position_ids"):
        converters.load(tmp_path / "old")


def test_trees_of_transformers_4():
    """The paths are those of FlaxCLIPModel."""
    paths = converters.mapping.flatten(nnx.state(random_model(), nnx.Param))
    for path in (
        "logit_scale",
        "text_model/embeddings/token_embedding/embedding",
        "text_model/final_layer_norm/scale",
        "text_projection/kernel",
        "vision_model/embeddings/class_embedding",
        "vision_model/embeddings/patch_embedding/kernel",
        "vision_model/encoder/layers/0/self_attn/q_proj/kernel",
        "vision_model/encoder/layers/0/mlp/fc1/bias",
        "vision_model/pre_layrnorm/bias",
        "visual_projection/kernel",
    ):
        assert path in paths, path


def test_what_is_not_supported_says_why(tmp_path):
    with pytest.raises(converters.ConversionError, match="heads do not divide"):
        VisionConfig(hidden_size=10, num_attention_heads=4)
    tensors = {
        "visual.conv1.weight": np.zeros((4, 3, 3, 3)),
        "transformer.resblocks.0.attn.in_proj_weight": np.zeros(3),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(converters.ConversionError, match="two transformers") as caught:
        converters.load(tmp_path)
    assert "missing: visual.proj" in caught.value.problems


@pytest.mark.peers
@hypothesis.settings(max_examples=3, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
@hypothesis.given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    wide=st.integers(1, 3),
    patch=st.sampled_from([2, 4]),
    side=st.sampled_from([8, 12]),
    act=st.sampled_from(["gelu", "quick_gelu", "relu"]),
    eps=st.sampled_from([1e-5, 1e-3]),
)
def test_random_configurations(layers, heads, wide, patch, side, act, eps):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    both = {"num_hidden_layers": layers, "hidden_size": 4 * heads * wide, "num_attention_heads": heads}
    both |= {"hidden_act": act, "layer_norm_eps": eps}
    config = transformers.CLIPConfig(
        text_config=TEXT | both | {"bos_token_id": 0},
        vision_config=VISION | both | {"patch_size": patch, "image_size": side},
        projection_dim=6,
    )
    model = transformers.CLIPModel(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        module, _ = converters.load(folder)
    images = RNG.normal(size=(2, side, side, 3)).astype(np.float32)
    assert_agree(ours(module, images), outputs(model, images), 1e-5)


def test_float16_runs():
    graph, state = nnx.split(random_model())
    half = nnx.merge(graph, jax.tree.map(lambda a: a.astype(jnp.float16), state))
    assert_agree(ours(half), ours(nnx.merge(graph, state)), 0.05)
