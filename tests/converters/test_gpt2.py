"""GPT-2: against transformers, byte for byte, the trees of transformers 4, the cache, generation, meshes."""

import importlib.util
import json
import runpy
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import converters
import tadrop_jax
from converters import ConversionError, gpt2

HEADS = tuple(gpt2.MODELS)
LM = "GPT2LMHeadModel"
TINY = gpt2.Config(
    n_embd=8,
    n_layer=2,
    n_head=2,
    vocab_size=20,
    n_positions=16,
    initializer_range=0.5,
    eos_token_id=None,
    pad_token_id=0,
    labels=("odd", "even", "neither"),
)
IDS = np.random.default_rng(0).integers(1, 20, (3, 6))
# On the left, for generation; and on the right.
LEFT = np.array([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])


def abstract_model(architecture, config=TINY):
    return nnx.eval_shape(lambda: gpt2.MODELS[architecture](config, rngs=nnx.Rngs(0)))


def random_model(architecture, config=TINY):
    """Biases and scales start at 0 and 1, where a mix-up would not show; and initialising compiles much."""
    graph, shapes = nnx.split(abstract_model(architecture, config))
    rng = np.random.default_rng(0)

    def values(path, leaf):  # of a size at which what is generated depends on what came before
        size, middle = (0.1, 0.0) if "bias" in str(path) else (0.2, 1.0) if "scale" in str(path) else (0.7, 0.0)
        return jnp.asarray(middle + size * rng.normal(size=leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(values, shapes))


@pytest.fixture(scope="module")
def language_model():
    return random_model(LM)


def write(directory, architecture, tensors, config=TINY):
    directory.mkdir()
    raw = config.to_dict() | {"architectures": [architecture]}
    (directory / "config.json").write_text(json.dumps(raw))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def random_tensors(architecture, dtype, config=TINY):
    rng = np.random.default_rng(1)
    shapes = nnx.state(abstract_model(architecture, config))
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), shapes)
    return converters.to_torch(tree, gpt2.table(config, architecture))


def assert_same_bytes(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name


def run_ours(module, **inputs):
    return np.asarray(nnx.jit(lambda model: model(**inputs))(module), np.float32)


def test_a_conv1d_kernel_is_not_turned_and_a_linear_one_is():
    tensors = random_tensors("GPT2ForSequenceClassification", np.float32)
    tree = converters.to_flax(tensors, gpt2.table(TINY, "GPT2ForSequenceClassification"))
    conv = tensors["transformer.h.1.attn.c_attn.weight"]
    assert conv.shape == (8, 24)
    np.testing.assert_array_equal(tree["transformer"]["h"][1]["attn"]["c_attn"]["kernel"], conv)
    np.testing.assert_array_equal(tree["score"]["kernel"], tensors["score.weight"].T)


def causal_masks(prefix, dtype):
    mask = np.tril(np.ones((16, 16), dtype))[None, None]
    low = np.array(-1e4, np.float32 if dtype in (np.bool_, np.uint8) else dtype)
    return {
        f"{prefix}h.{i}.attn.{name}": array.copy()
        for i in range(2)
        for name, array in (("bias", mask), ("masked_bias", low))
    }


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32, np.float16, ml_dtypes.bfloat16])
def test_old_files_with_masks_tied_weights_and_no_prefix_come_back(dtype, tmp_path):
    """As openai-community/gpt2 has them: the language model without `transformer.` before its names."""
    tensors = random_tensors(LM, np.float32)
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    old = bare | causal_masks("", dtype) | {"lm_head.weight": bare["wte.weight"].copy()}
    module, _ = converters.load(write(tmp_path / "old", LM, old))
    np.testing.assert_array_equal(module.transformer.wte.embedding[...], bare["wte.weight"])
    converters.save(tmp_path / "again", module)
    assert_same_bytes(converters.read_tensors(tmp_path / "again"), old)


def test_output_weights_may_be_stored_in_place_of_the_embedding(tmp_path):
    tensors = random_tensors(LM, np.float32)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    module, _ = converters.load(write(tmp_path / "alone", LM, tensors))
    np.testing.assert_array_equal(module.transformer.wte.embedding[...], tensors["lm_head.weight"])
    converters.save(tmp_path / "again", module)
    assert_same_bytes(converters.read_tensors(tmp_path / "again"), tensors)


def test_a_bare_model_opens_the_names_of_one_with_a_head(tmp_path):
    tensors = random_tensors("GPT2Model", np.float32)
    old = {f"transformer.{name}": array for name, array in tensors.items()} | causal_masks("transformer.", np.bool_)
    module, _ = converters.load(write(tmp_path / "old", "GPT2Model", old))
    np.testing.assert_array_equal(module.ln_f.bias[...], tensors["ln_f.bias"])
    converters.save(tmp_path / "again", module)
    assert_same_bytes(converters.read_tensors(tmp_path / "again"), old)


def test_a_second_output_matrix_under_a_tied_configuration_is_refused(tmp_path):
    tensors = random_tensors(LM, np.float32)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    with pytest.raises(ConversionError, match=r"lm_head\.weight"):
        converters.load(write(tmp_path / "bad", LM, tensors))


def test_untied_output_weights_have_their_own_tensor(tmp_path):
    config = gpt2.Config.from_dict(TINY.to_dict() | {"tie_word_embeddings": False})
    tensors = random_tensors(LM, np.float32, config)
    module, _ = converters.load(write(tmp_path / "untied", LM, tensors, config))
    np.testing.assert_array_equal(module.lm_head.kernel[...], tensors["lm_head.weight"].T)
    converters.save(tmp_path / "again", module)
    assert_same_bytes(converters.read_tensors(tmp_path / "again"), tensors)


def test_without_a_configuration_the_heads_are_asked_for(tmp_path):
    tensors = random_tensors(LM, np.float32)
    path = write(tmp_path / "bare", LM, tensors) / "config.json"
    raw = json.loads(path.read_text())
    for architecture in HEADS:
        names = random_tensors(architecture, np.float32)
        assert converters.families.detect({}, names).name == architecture
    path.unlink()
    with pytest.raises(ConversionError, match="number of heads"):
        converters.load(tmp_path / "bare")
    del raw["architectures"]
    path.write_text(json.dumps(raw))
    assert type(converters.load(tmp_path / "bare")[0]) is gpt2.MODELS[LM]
    path.write_text(json.dumps(raw | {"model_type": "gpt_bigcode"}))
    with pytest.raises(ConversionError, match="gpt_bigcode"):
        converters.load(tmp_path / "bare")


def test_the_configuration_travels():
    raw = {
        "model_type": "gpt2",
        "hidden_size": 12,
        "num_attention_heads": 3,
        "eos_token_id": [3, 5],
        "num_labels": 3,
        "resid_pdrop": 0.3,
        "task_specific_params": {"text-generation": {"max_length": 50}},
    }
    config = gpt2.Config.from_dict(raw)
    assert (config.n_embd, config.n_head, config.inner) == (12, 3, 48)
    assert config.eos_token_id == (3, 5)
    assert config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    written = config.to_dict()
    assert written["eos_token_id"] == [3, 5]
    assert written["resid_pdrop"] == 0.3
    assert written["task_specific_params"] == raw["task_specific_params"]
    assert gpt2.Config.from_dict(written) == config
    hash(config)  # it is a static part of compiled functions


def test_unsupported_configurations_say_why():
    with pytest.raises(ConversionError) as caught:
        gpt2.Config.from_dict({"activation_function": "mish", "n_head": 5, "add_cross_attention": True})
    assert len(caught.value.problems) == 3


# Recorded from FlaxGPT2LMHeadModel and FlaxGPT2Model of transformers 4.46.3: logits and features of tokens 0, 3, 1, 4,
# where the k-th leaf, in the order of paths, is sin(0.7 * index + k).
V4_SHAPES = {
    "h/{i}/attn/c_attn/bias": (18,),
    "h/{i}/attn/c_attn/kernel": (18, 6),
    "h/{i}/attn/c_proj/bias": (6,),
    "h/{i}/attn/c_proj/kernel": (6, 6),
    "h/{i}/ln_1/bias": (6,),
    "h/{i}/ln_1/scale": (6,),
    "h/{i}/ln_2/bias": (6,),
    "h/{i}/ln_2/scale": (6,),
    "h/{i}/mlp/c_fc/bias": (9,),
    "h/{i}/mlp/c_fc/kernel": (9, 6),
    "h/{i}/mlp/c_proj/bias": (6,),
    "h/{i}/mlp/c_proj/kernel": (6, 9),
    "ln_f/bias": (6,),
    "ln_f/scale": (6,),
    "wpe/embedding": (7, 6),
    "wte/embedding": (5, 6),
}
V4_OUTPUTS = {
    LM: [
        [-2.91451, 0.93457, 1.99814, -2.8938, 0.83929],
        [-3.16351, 0.53391, 2.64, -3.12248, 0.42166],
        [-3.16481, 0.41017, 2.76263, -3.11899, 0.2956],
        [-3.2403, 1.18838, 2.07506, -3.22303, 1.08518],
    ],
    "GPT2Model": [
        [-1.1651, -0.24458, -0.03533, 0.75644, 0.44022, 0.85238],
        [-1.17863, -0.43772, -0.63456, 0.90872, 0.60028, 0.76967],
        [-1.17395, -0.34841, -0.81066, 0.85729, 0.69655, 0.79236],
        [-1.14626, -0.16561, -0.13986, 1.04507, 0.54886, 0.95214],
    ],
}


@pytest.mark.parametrize("architecture", V4_OUTPUTS)
def test_trees_of_transformers_4_read_and_write(architecture):
    config = gpt2.Config(n_embd=6, n_layer=2, n_head=2, vocab_size=5, n_positions=7, n_inner=9)
    prefix = "" if architecture == "GPT2Model" else "transformer/"
    names = sorted({name.format(i=i): shape for name, shape in V4_SHAPES.items() for i in range(2)}.items())
    tree = {
        prefix + name: np.sin(0.7 * np.arange(np.prod(shape)) + k).reshape(shape).astype(np.float32)
        for k, (name, shape) in enumerate(names)
    }
    model = abstract_model(architecture, config)
    rows = gpt2.flax_table(config, architecture)
    nnx.update(model, jax.tree.map(jnp.asarray, converters.to_flax(tree, rows, expect=model)))
    output = run_ours(model, input_ids=jnp.array([[0, 3, 1, 4]]))
    np.testing.assert_allclose(output[0], V4_OUTPUTS[architecture], atol=2e-5)
    assert_same_bytes(converters.to_torch(model, rows), tree)


def test_the_cache_changes_nothing(language_model):
    run = nnx.jit(lambda model, ids, mask, positions, cache: model(ids, mask, positions, cache=cache))
    positions = np.maximum(np.cumsum(LEFT, axis=1) - 1, 0)
    want = run(language_model, IDS, LEFT, positions, None)
    cache = gpt2.empty_cache(TINY, batch=3, places=9)
    got = []
    for part in (slice(0, 3), slice(3, 4), slice(4, 6)):
        logits, cache = run(language_model, IDS[:, part], LEFT[:, part], positions[:, part], cache)
        got.append(logits)
    assert int(cache.length) == 6
    seen = LEFT.astype(bool)
    np.testing.assert_allclose(np.concatenate(got, axis=1)[seen], np.asarray(want)[seen], rtol=1e-5, atol=1e-5)

    # Positions count on by themselves, and nothing that is to come is looked at.
    both = run(language_model, IDS, None, None, None)
    _, cache = run(language_model, IDS[:, :3], None, None, gpt2.empty_cache(TINY, batch=3, places=9))
    rest, _ = run(language_model, IDS[:, 3:4], None, None, cache)
    np.testing.assert_allclose(rest[:, 0], both[:, 3], rtol=1e-5, atol=1e-5)


def test_a_full_cache_is_told(language_model):
    run = nnx.jit(lambda model, ids, cache: model(ids, cache=cache))
    cache = gpt2.empty_cache(TINY, batch=3, places=4)._replace(length=jnp.int32(3))
    with pytest.raises(ValueError, match="4 places, 3 are taken, 2 more"):
        language_model(IDS[:, :2], cache=cache)
    assert np.isnan(run(language_model, IDS[:, :2], cache)[0]).all()
    assert np.isfinite(run(language_model, IDS[:, :2], cache._replace(length=jnp.int32(2)))[0]).all()
    with pytest.raises(ValueError, match="n_positions = 16"):
        language_model(np.ones((1, 17), int))


def test_drawing_follows_the_probabilities(language_model):
    count = 4000
    prompt = np.repeat(IDS[:1, :4], count, axis=0)
    drawn = gpt2.generate(language_model, prompt, max_new_tokens=1, temperature=2.0, key=jax.random.key(1))
    logits = run_ours(language_model, input_ids=IDS[:1, :4])[0, -1] / 2.0
    want = np.asarray(jax.nn.softmax(logits))
    shares = np.bincount(np.asarray(drawn)[:, -1], minlength=20) / count
    assert (abs(shares - want) < 5 * np.sqrt(want * (1 - want) / count) + 1e-4).all()


def test_top_k_of_one_is_greedy_and_a_key_fixes_the_draw(language_model):
    options = {"max_new_tokens": 6, "key": jax.random.key(3)}
    greedy = gpt2.generate(language_model, IDS, max_new_tokens=6)
    assert (gpt2.generate(language_model, IDS, temperature=0.7, top_k=1, **options) == greedy).all()
    first, second = (gpt2.generate(language_model, IDS, temperature=3.0, **options) for _ in range(2))
    assert (first == second).all()
    assert (first != greedy).any()


def test_a_sequence_ends_at_eos_and_is_padded_after(language_model):
    greedy = np.asarray(gpt2.generate(language_model, IDS, max_new_tokens=6))
    eos = int(greedy[0, 6])
    ended = np.asarray(gpt2.generate(language_model, IDS, max_new_tokens=6, eos_token_id=(eos, 99), pad_token_id=0))
    ends = [6 if eos not in row else list(row).index(eos) + 1 for row in greedy[:, 6:]]
    assert len(set(ends)) > 1  # one goes on when another has ended
    for row, want, end in zip(ended[:, 6:], greedy[:, 6:], ends, strict=True):
        np.testing.assert_array_equal(row[:end], want[:end])
        assert (row[end:] == 0).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"attention_mask": LEFT[:, ::-1]}, "left"),
        ({"attention_mask": LEFT[:2]}, r"\(2, 6\)"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 12}, "n_positions is 16"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": 1}, "key"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_generation_refuses_what_makes_no_sense(options, told, language_model):
    with pytest.raises(ValueError, match=told):
        gpt2.generate(language_model, IDS, **({"max_new_tokens": 2} | options))


def test_several_sequences_need_a_padding_token_for_one_label_each():
    config = gpt2.Config.from_dict(TINY.to_dict() | {"pad_token_id": None})
    model = random_model("GPT2ForSequenceClassification", config)
    assert run_ours(model, input_ids=IDS[:1]).shape == (1, 3)
    with pytest.raises(ValueError, match="pad_token_id"):
        run_ours(model, input_ids=IDS)


def test_a_mesh_changes_nothing(language_model):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = converters.shard(language_model, mesh)
    block = model.transformer.h[0]
    assert block.mlp.c_fc.kernel[...].sharding.spec == P(None, "model")
    assert block.mlp.c_proj.kernel[...].sharding.spec == P("model")
    assert block.ln_1.scale[...].sharding.is_fully_replicated
    assert len(language_model.transformer.h[0].mlp.c_fc.kernel[...].sharding.device_set) == 1
    ids = np.repeat(IDS[:2], 2, axis=0)
    run = nnx.jit(lambda model, ids: model(ids))
    got = run(model, jax.device_put(ids, NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(got, run(language_model, ids), rtol=1e-5, atol=1e-5)

    tokens = gpt2.generate(model, ids, max_new_tokens=6)
    np.testing.assert_array_equal(tokens, gpt2.generate(language_model, ids, max_new_tokens=6))

    params = nnx.state(model)
    merged = tadrop_jax.merge(params, [params], tadrop_jax.task_arithmetic(1.0))
    assert merged["transformer"]["h"][0]["mlp"]["c_fc"]["kernel"][...].sharding.spec == P(None, "model")


def test_a_model_without_sharding_rules_is_told(monkeypatch, language_model):
    monkeypatch.delattr(gpt2, "SHARDING")
    with pytest.raises(ConversionError, match=r"converters\.gpt2 has no sharding rules"):
        converters.shard(language_model, jax.make_mesh((8,), ("model",)))


def test_the_example_runs(capsys, tmp_path):
    path = Path(__file__).parents[2] / "examples" / "gpt2_generate.py"
    example = runpy.run_path(str(path))
    text = example["main"](["--prompt", "ab", "--new-tokens", "5"])
    assert text.startswith("ab")
    assert "GPT2LMHeadModel with" in capsys.readouterr().out
    directory = example["random_directory"](tmp_path)
    drawn = example["main"](
        [str(directory), "--prompt", "ab", "--new-tokens", "5", "--temperature", "9", "--seed", "1"]
    )
    assert drawn.startswith("ab")
    assert drawn != text


def test_the_example_says_where_bytes_are_not_the_models_tokens(capsys, tmp_path, monkeypatch):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "gpt2_generate.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    encode, decode = example["coder"](tmp_path)
    assert decode(encode("ab")) == "ab"
    assert capsys.readouterr().out == ""
    (tmp_path / "vocab.json").write_text("{}")
    example["coder"](tmp_path)
    assert "transformers is not installed: bytes stand for the model's tokens" in capsys.readouterr().out


# --- against transformers ---------------------------------------------------------------------------------------------


def make_peer(architecture, dtype="float32", **fields):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    fields = {"vocab_size": 20, "n_positions": 16, "pad_token_id": 0, "bos_token_id": None} | fields
    config = transformers.GPT2Config(initializer_range=0.3, eos_token_id=fields.pop("eos_token_id", None), **fields)
    peer = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return peer.to(getattr(torch, dtype))


def run_peer(peer, **inputs):
    import torch

    with torch.no_grad():
        output = peer(**{name: torch.tensor(array) for name, array in inputs.items()})
    return (output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits).float().numpy()


# The first of each is what hypothesis tries first: the example that has most in it.
CONFIGS = st.fixed_dictionaries(
    {
        "n_layer": st.sampled_from([2, 1, 3]),
        "n_head": st.sampled_from([3, 1, 2]),
        "head_width": st.sampled_from([4, 2]),
        "n_inner": st.sampled_from([None, 5, 24]),
        "activation_function": st.sampled_from(["gelu_new", "gelu", "relu", "silu", "tanh", "quick_gelu", "relu2"]),
        "scale_attn_weights": st.sampled_from([True, False]),
        "scale_attn_by_inverse_layer_idx": st.sampled_from([True, False]),
        "reorder_and_upcast_attn": st.booleans(),
        "layer_norm_epsilon": st.sampled_from([1e-5, 1e-2]),
        "tie_word_embeddings": st.sampled_from([True, False]),
        "num_labels": st.sampled_from([3, 1]),
    }
)


@pytest.mark.peers
@pytest.mark.parametrize("architecture", HEADS)
# Every example compiles, so that shrinking one would take minutes.
@hypothesis.settings(max_examples=2, phases=[hypothesis.Phase.generate])
@hypothesis.given(fields=CONFIGS, right=st.booleans())
def test_outputs_and_files_agree_with_transformers(architecture, fields, right, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("gpt2")
    width = fields.pop("head_width")
    peer = make_peer(architecture, n_embd=fields["n_head"] * width, **fields)
    peer.save_pretrained(tmp_path / "peer")
    module, _ = converters.load(tmp_path / "peer")

    mask = LEFT[:, ::-1].copy() if right else LEFT
    ids = np.where(mask, IDS, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not right:
        inputs["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        inputs["token_type_ids"] = IDS[:, ::-1].copy() % 3
    want, got = run_peer(peer, **inputs), run_ours(module, **inputs)
    assert got.shape == want.shape
    seen = mask.astype(bool) if got.ndim == 3 else slice(None)
    np.testing.assert_allclose(got[seen], want[seen], rtol=1e-5, atol=1e-5)

    converters.save(tmp_path / "ours", module)
    assert_same_bytes(converters.read_tensors(tmp_path / "ours"), converters.read_tensors(tmp_path / "peer"))
    again, info = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    np.testing.assert_array_equal(run_peer(again.eval(), **inputs), want)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_to_its_precision(dtype, tmp_path):
    peer = make_peer(LM, dtype, n_embd=12, n_layer=2, n_head=3)
    peer.save_pretrained(tmp_path / "peer")
    module, params = converters.load(tmp_path / "peer")
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    want, got = run_peer(peer, input_ids=IDS), run_ours(module, input_ids=IDS)
    exact = run_peer(peer.float(), input_ids=IDS)
    # Both round after each operation, and so both are off the exact ones by about as much.
    allowed = float(jnp.finfo(dtype).eps) * abs(exact).max()
    assert abs(got - exact).max() < 4 * allowed
    assert abs(got - want).max() < 4 * allowed
    converters.save(tmp_path / "ours", module)
    assert_same_bytes(converters.read_tensors(tmp_path / "ours"), converters.read_tensors(tmp_path / "peer"))


@pytest.mark.peers
def test_greedy_generation_agrees_with_transformers(tmp_path):
    torch = pytest.importorskip("torch")

    peer = make_peer(LM, n_embd=12, n_layer=2, n_head=3, n_positions=40)
    peer.save_pretrained(tmp_path / "peer")
    module, _ = converters.load(tmp_path / "peer")
    ids = np.where(LEFT, IDS, 0)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(LEFT)}
    want = peer.generate(**inputs, max_new_tokens=20, do_sample=False).numpy()
    got = np.asarray(gpt2.generate(module, ids, attention_mask=LEFT, max_new_tokens=20))
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(want[:, 6:])) > 3  # else it shows little

    eos = int(want[0, 9])
    want = peer.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=eos).numpy()
    got = np.asarray(gpt2.generate(module, ids, attention_mask=LEFT, max_new_tokens=20, eos_token_id=eos))
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    assert (got[:, want.shape[1] :] == 0).all()


@pytest.mark.peers
@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.6), (5, 0.8), (50, 1.0), (None, 1e-3)])
def test_the_tokens_left_to_draw_from_are_those_of_transformers(top_k, top_p):
    torch = pytest.importorskip("torch")
    logits = pytest.importorskip("transformers.generation.logits_process")
    scores = np.random.default_rng(0).normal(size=(4, 20)).astype(np.float32) * 2
    want = torch.tensor(scores)
    if top_k is not None:
        want = logits.TopKLogitsWarper(top_k)(None, want)
    if top_p is not None:
        want = logits.TopPLogitsWarper(top_p)(None, want)
    np.testing.assert_array_equal(gpt2.filter_logits(jnp.asarray(scores), top_k, top_p), want.numpy())
