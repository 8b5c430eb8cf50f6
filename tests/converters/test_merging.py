"""Checkpoints that are converted and then merged, or merged and then converted: the same weights.

`test_layout.py` holds this for trees and tables; here are whole files, loaded modules and their `nnx.State`.
"""

import jax
import numpy as np
import pytest
from flax import nnx

import converters
import tadrop_jax as tj
from converters import clip, families, gpt2
from converters.files import safetensors
from converters.loading import abstract
from converters.mapping import flatten, nest
from tadrop_jax.cli import main
from tests.helpers import read_model

GPT2 = gpt2.Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16)
CLIP = clip.Config(
    vision=clip.VisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    ),
    text=clip.TextConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=20,
        max_position_embeddings=7, eos_token_id=19,
    ),
    projection_dim=6,
)  # fmt: skip
# Few tensors of few shapes: each is compiled. Attention of GPT-2 is fused in both; 3 x 4 x 4 patches are turned.
INCLUDE = {"gpt2": r"(c_attn|mlp\Wc_proj)\W(weight|kernel)", "clip": r"(patch_embedding|fc1)\W(weight|kernel)"}
# Conv1D keeps its weight (in, out) in PyTorch too.
INPUTS = {"gpt2": 0, "clip": -1}


def write(folder, architecture, config, seed: int, bare: bool) -> None:
    """A random model; `bare` without the prefix that the table has, as openai-community/gpt2."""
    entry = families.architecture(architecture)
    module = abstract(families.package_of(entry), config, entry)
    rng = np.random.default_rng(seed)
    leaves = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in flatten(module).items()}
    converters.save(folder, nest(leaves), config, architecture=architecture)
    if bare:
        tensors = {n.removeprefix("transformer."): a for n, a in converters.read_tensors(folder).items()}
        (folder / "model.safetensors").unlink()
        safetensors.write(folder, tensors)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for k in range(3):
        write(root / f"gpt2-{k}", "GPT2LMHeadModel", GPT2, k, bare=True)
        write(root / f"clip-{k}", "CLIPModel", CLIP, k, bare=False)
    return root


METHODS = {
    "dare": lambda inputs: (tj.average(), tj.dare(0.5)),
    "della": lambda inputs: (tj.average(), tj.della(0.5, 0.2)),
    "n_m": lambda inputs: (tj.average(), tj.n_m(2, 4)),
    "breadcrumbs": lambda inputs: (tj.task_arithmetic(0.4), tj.breadcrumbs(0.5, 0.2)),
    "wudi": lambda inputs: (tj.wudi(steps=3, input_axis=inputs), None),
}


def loaded(root, family):
    """The modules and their parameters, and the files' tensors."""
    folders = [root / f"{family}-{k}" for k in range(3)]
    return [converters.load(folder) for folder in folders], [converters.read_tensors(folder) for folder in folders]


def back(module, params, folder):
    nnx.update(module, params)
    converters.save(folder, module)
    return converters.read_tensors(folder)


@pytest.mark.parametrize("family", ["gpt2", "clip"])
@pytest.mark.parametrize("method", METHODS)
def test_before_or_after_conversion(method, family, root, tmp_path):
    (rule, sparsifier), include = METHODS[method](INPUTS[family]), INCLUDE[family]
    models, files = loaded(root, family)
    module, base = models[0]
    options = {"sparsifier": sparsifier, "include": include, "key": jax.random.key(3)}
    before = tj.merge(files[0], files[1:], rule, **options)
    after = tj.merge(base, [p for _, p in models[1:]], rule, layout=converters.layout(module), **options)
    assert isinstance(after, nnx.State)
    found = back(module, after, tmp_path / "merged")
    assert found.keys() == before.keys()
    assert sum(not np.array_equal(before[n], files[0][n]) for n in before) >= 2
    for name, want in before.items():
        np.testing.assert_allclose(found[name], want, rtol=2e-6, atol=2e-7, err_msg=name)
        np.testing.assert_array_equal(found[name] == files[0][name], want == files[0][name], err_msg=name)


def test_regmean_before_or_after_conversion(root, tmp_path):
    """Conv1D lies (in, out) in both; CLIP's Linear (out, in) in PyTorch only."""
    rng = np.random.default_rng(0)
    paths = {"gpt2": "transformer/h/0/attn/c_attn/kernel", "clip": "vision_model/encoder/layers/0/mlp/fc1/kernel"}
    for family, path in paths.items():
        models, files = loaded(root, family)
        module, base = models[0]
        name, order = converters.layout(module)(path)
        assert name in files[0]
        assert order == {"gpt2": None, "clip": (1, 0)}[family]
        inputs = [rng.normal(size=(20, 8)).astype(np.float32) for _ in range(2)]
        grams = [x.T @ x / len(x) for x in inputs]
        options = {"include": f"^({name}|{path})$"}
        turned = [f"^{name}$"] if order else ()
        by_name, by_path = [{name: g} for g in grams], [{path: g} for g in grams]
        before = tj.regmean(None, None, files[0], files[1:], grams=by_name, out_in=turned, **options).params
        after = tj.regmean(None, None, base, [p for _, p in models[1:]], grams=by_path, **options).params
        found = back(module, after, tmp_path / family)
        assert not np.array_equal(found[name], files[0][name])
        for tensor, want in before.items():
            np.testing.assert_allclose(found[tensor], want, rtol=1e-5, atol=1e-5, err_msg=tensor)


def test_a_fused_projection_is_not_one_to_one(root):
    """OpenAI's files hold query, key and value in one tensor: random numbers go by the module's three."""
    module, _ = converters.load(root / "clip-0")
    assert converters.fused(module) == {}
    rows = clip.table(CLIP, "openai/CLIP")
    (weight, bias) = [parts for name, parts in converters.fused(rows).items() if name.startswith("visual")]
    assert [path.rpartition("self_attn/")[2] for path in weight] == ["q_proj/kernel", "k_proj/kernel", "v_proj/kernel"]
    assert len(bias) == 3
    path = "vision_model/encoder/layers/0/self_attn/q_proj/kernel"
    assert converters.layout(rows)(path) == (path, (1, 0))


def test_directories_of_flax_merge_as_those_of_pytorch_with_the_names_of_their_own_files(root, tmp_path):
    """Random numbers are drawn by the names that the PyTorch files had: those without a prefix."""
    options = ("--sparsify", "dare:density=0.5", "--method", "task_arithmetic")
    for k in range(3):
        converters.convert(root / f"gpt2-{k}", tmp_path / f"gpt2-{k}", to="flax", format="npz")
    for folder, out in ((root, tmp_path / "before"), (tmp_path, tmp_path / "after")):
        given = [str(folder / f"gpt2-{k}") for k in range(3)]
        assert main(["merge", "--base", given[0], "--models", *given[1:], *options, "--out", str(out)]) == 0
    converters.convert(tmp_path / "after", tmp_path / "back", to="torch")
    before, after = read_model(tmp_path / "before"), read_model(tmp_path / "back")
    assert "h.0.attn.c_attn.weight" in before
    assert after.keys() == before.keys()
    for name, want in before.items():
        np.testing.assert_array_equal(after[name], want, err_msg=name)


def test_trees_with_other_axes_are_turned(root, tmp_path):
    """msgpack has the axes of transformers 4, Orbax those of our modules, under the same names."""
    for k, format in enumerate(("orbax", "orbax", "msgpack")):
        converters.convert(root / f"gpt2-{k}", tmp_path / f"gpt2-{k}", to="flax", format=format)
    for folder, out in ((root, tmp_path / "torch"), (tmp_path, tmp_path / "mixed")):
        given = [str(folder / f"gpt2-{k}") for k in range(3)]
        assert (
            main(["merge", "--base", given[0], "--models", *given[1:], "--method", "average", "--out", str(out)]) == 0
        )
    converters.convert(tmp_path / "mixed", tmp_path / "back", to="torch")
    before, after = read_model(tmp_path / "torch"), read_model(tmp_path / "back")
    assert after.keys() == before.keys()
    for name, want in before.items():
        np.testing.assert_array_equal(after[name], want, err_msg=name)
