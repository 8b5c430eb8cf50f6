"""mergekit's recipes: what is read, what is told, what is refused; and mergekit's own run of the same file."""

import numpy as np
import pytest
import yaml

from tadrop_jax import mergekit_recipe, recipe
from tadrop_jax.cli import main
from tadrop_jax.errors import MergeError
from tests import helpers

LAYER = {
    "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (8, 8),
    "mlp.up_proj": (8, 8),
    "mlp.down_proj": (8, 8),
}
SHAPES = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,), "lm_head.weight": (32, 8)} | {
    f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in LAYER.items()
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
ONE = "base_model: base\nmodels: [{model: base}, {model: m0}]\n"
TWO = "base_model: base\nmodels: [{model: m0, parameters: {weight: .3}}, {model: m1, parameters: {weight: .9}}]\n"
SPARSE = (
    "base_model: base\nmodels: [{model: base}, {model: m0, parameters: {weight: .3, density: .5}}, "
    "{model: m1, parameters: {weight: .9}}]\n"
)
# Each of mergekit's methods that is not random, or not at density 1.
RECIPES = {
    "linear": "models: [{model: m0, parameters: {weight: .3}}, {model: m1, parameters: {weight: .9}}]",
    "linear of a base": "base_model: base\nmodels: [{model: m0}]\nparameters: {weight: .5, normalize: false}",
    "task_arithmetic": TWO + "parameters: {lambda: .7, normalize: true, int8_mask: true}",
    "ties": SPARSE + "parameters: {density: .7, lambda: 1.1}",
    "ties summed": SPARSE + "parameters: {density: [.7, .7], normalize: no}",
    "dare_linear": TWO + "parameters: {rescale: true}",
    "dare_ties": TWO + "parameters: {normalize: true}",
    "breadcrumbs": SPARSE + "parameters: {density: .7, gamma: .1}",
    "breadcrumbs_ties": SPARSE + "parameters: {density: .7, rescale: true}",
    "della": TWO + "parameters: {epsilon: .1}",
    "della_linear": TWO,
    "sce": TWO + "parameters: {select_topk: .4}",
    "ram": TWO + "parameters: {epsilon: 1e-1}",
    "ramplus_tl": TWO + "parameters: {epsilon: .1, r: .2}",
    "slerp": ONE + "parameters: {t: .3}",
    "slerp of a slice": "base_model: base\nparameters: {t: [{value: .4}]}\nslices:\n- sources:\n"
    "  - {model: base, layer_range: [0, 2]}\n  - {model: m0, layer_range: [0, 2]}",
    "nuslerp": TWO,
    "nuslerp of weights": TWO.removeprefix("base_model: base\n") + "parameters: {nuslerp_flatten: false}",
    "multislerp": TWO,
    "multislerp of weights": TWO.removeprefix("base_model: base\n") + "parameters: {normalize_weights: false}",
    "karcher": TWO + "parameters: {max_iter: 3}",
    "nearswap": ONE + "parameters: {t: 2e-1}",
    "arcee_fusion": ONE,
    "model_stock": TWO,
    "model_stock of rows": TWO + "parameters: {filter_wise: true}",
}


@pytest.fixture
def folder(tmp_path):
    helpers.save_family(tmp_path, 2, SHAPES, config=CONFIG)
    return tmp_path


def written(folder, method: str, rest: str):
    """The recipe in a file, of the method that the case's name begins with."""
    file = folder / "recipe.yaml"
    file.write_text(f"merge_method: {method.split()[0]}\n{rest}\n")
    return file


@pytest.mark.peers
@pytest.mark.parametrize("case", RECIPES)
def test_mergekit_runs_the_same_recipe(case, folder, monkeypatch, capsys):
    """Onto the same weights, but for its rounding."""
    run = pytest.importorskip("mergekit.merge")
    from mergekit.config import MergeConfiguration

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)  # mergekit's paths count from the working directory
    file = written(folder, case, RECIPES[case] + "\ndtype: float32")
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    options = run.MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run.run_merge(config, str(folder / "theirs"), options)
    assert main(["merge", str(file), "--out", str(folder / "ours"), "--quiet"]) == 0
    ours, theirs = (helpers.read_model(folder / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=2e-6, err_msg=name)
    capsys.readouterr()


@pytest.mark.peers
def test_every_method_is_read_or_refused():
    """A method that mergekit gains has to be looked at."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    names = {method.spec.name for method in registry.registered_methods()}
    assert names - mergekit_recipe._METHODS.keys() == {"passthrough"}


@pytest.mark.peers
def test_defaults_are_mergekits():
    """Names and defaults of every parameter, but for those without effect."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    for name, reading in mergekit_recipe._METHODS.items():
        spec = {p.name: p for p in registry.get(name).spec.parameters}
        for parameter, asked in reading.asked.items():
            default = mergekit_recipe._NEEDED if spec[parameter].required else spec[parameter].default
            assert asked.default == default, (name, parameter)
            assert asked.each == (spec[parameter].scope.value != "shared"), (name, parameter)


def test_what_is_read(tmp_path):
    told = []
    file = written(tmp_path, "ties", SPARSE + "parameters: {density: 0.7, int8_mask: true}\ndtype: bfloat16")
    found = recipe.load(file, told.append)
    assert found["method"] == "ties"
    assert (found["base"], found["models"]) == (str(tmp_path / "base"), [str(tmp_path / m) for m in ("m0", "m1")])
    assert found["dtype"] == "bfloat16"
    chosen = {"density": [0.5, 0.7], "weights": [0.3, 0.9], "coefficient": 1.0, "flavour": "mergekit"}
    assert {k: found["parameters"][k] for k in chosen} == chosen
    assert told == ["int8_mask is left out: it has no effect here"]


def test_what_is_told(tmp_path):
    told = []
    rest = "models: [{model: a, parameters: {tol: .1}}, {model: b}]\nparameters: {density: 1}\nchat_template: auto"
    found = recipe.load(
        written(tmp_path, "karcher", rest + "\ntokenizer_source: base\nout_dtype: float16"), told.append
    )
    assert found["base"] == found["models"][0]
    assert found["dtype"] == "float16"
    assert [line.split(":")[0] for line in told] == [
        "chat_template is left out",
        "density is left out",
        "tol of a single model is left out",
        "there is no base_model",
    ]


def test_a_base_that_mergekit_takes_for_a_model(tmp_path):
    found = recipe.load(written(tmp_path, "karcher", "base_model: base\nmodels: [{model: a}, {model: b}]"))
    assert found["models"] == [str(tmp_path / m) for m in ("a", "b", "base")]


def test_the_command_line_tells_and_merges(folder, capsys):
    file = written(folder, "ties", SPARSE + "parameters: {density: .7, int8_mask: true}")
    assert main(["merge", str(file), "--out", str(folder / "out")]) == 0
    assert "int8_mask is left out" in capsys.readouterr().err
    assert helpers.report_of(folder / "out")["recipe"]["parameters"]["flavour"] == "mergekit"


@pytest.mark.parametrize(
    ("method", "rest", "said"),
    [
        ("passthrough", ONE, "merge_method 'passthrough' is not read"),
        ("ties", "models: [{model: m0, parameters: {weight: 1}}]", "ties needs a base_model"),
        ("ties", "base_model: base\nmodels: [{model: m0}]", "weight is missing, of .*m0"),
        ("slerp", ONE, "t is missing"),
        ("slerp", ONE + "parameters: {t: [0, .5, 1]}", "t differs by layer or tensor"),
        ("slerp", ONE + "parameters: {t: [{filter: mlp, value: .5}]}", "t differs by layer or tensor"),
        ("slerp", ONE + "parameters: {t: [{filter: mlp, value: .5}, {value: .4}]}", "t differs by layer or tensor"),
        ("slerp", ONE + "parameters: {t: true}", "t must be a number, got True"),
        ("model_stock", TWO + "parameters: {filter_wise: maybe}", "filter_wise must be true or false, got 'maybe'"),
        ("ties", TWO + "parameters: {rescale: true}", "rescale: true of ties is not read"),
        ("linear", TWO + "parameters: {normalize: false, weight: 1}", "the weights must sum to 1, not 2.2"),
        ("karcher", ONE + "slices: []", "a recipe has models, or slices"),
        ("karcher", "models: [m0, m1]", "models must be a list"),
        ("karcher", "models: null", "a recipe has models, or slices"),
        ("[karcher]", ONE, "merge_method \\['karcher'\\] is not read"),
        ("della", SPARSE, "density of della is 1, its default, for some models"),
        ("karcher", "models: [{model: m0}, {model: m0}]", "m0 is listed twice"),
        ("karcher", "models: [{model: m0+lora}, {model: m1}]", "without a LoRA adapter; got 'm0\\+lora'"),
        ("karcher", "models: [{model: {model: m0, lora: l}}]", "without a LoRA adapter"),
        ("karcher", ONE + "parameters: 3", "parameters must be a mapping"),
        ("karcher", ONE + "tokenizer_source: union", "tokenizer_source is not read: only the base's vocabulary"),
        ("karcher", ONE + "tokenizer: {source: base, tokens: {}}", "tokenizer is not read"),
        ("karcher", ONE + "modules: {}", "modules is not read: write models"),
        ("karcher", ONE + "dtype: float64", "dtype must be float32, bfloat16 or float16"),
        ("nearswap", "base_model: base\nmodels: [{model: base}]\nparameters: {t: 1}", "no model to merge besides"),
        ("karcher", "slices: [{sources: [{model: m0, layer_range: [0, 2]}]}, {}]", "slices that put a model together"),
        ("karcher", "slices: [{sources: [{model: m0, layer_range: [0, 1]}]}]", "a slice must be the whole model"),
        ("karcher", "slices: [{sources: [{model: broken, layer_range: [0, 1]}]}]", "is not valid JSON"),
        ("karcher", "slices: [{sources: [{model: list, layer_range: [0, 1]}]}]", "the whole model, here .*0, \\?"),
    ],
)
def test_refusals(method, rest, said, tmp_path, capsys):
    for name, text in (("broken", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    file = written(tmp_path, method, rest)
    with pytest.raises(MergeError, match=f"recipe.yaml: .*{said}"):
        recipe.load(file)
    assert main(["merge", str(file), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
