"""The command line on real files: what it writes and what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import tadrop_jax as tj
from tadrop_jax import registry
from tadrop_jax.cli import main
from tests.helpers import (
    DTYPES,
    REPOSITORY,
    command,
    family,
    files_of,
    merge,
    read_model,
    report_of,
    save_family,
    save_model,
)

pytestmark = pytest.mark.optimised

SHAPES = {"layer/kernel": (24, 9), "layer/bias": (9,), "head.weight": (3, 9)}


@pytest.fixture
def root(tmp_path) -> Path:
    """Directories base, m0 and m1."""
    save_family(tmp_path, 2, SHAPES, config={"model_type": "vit"})
    return tmp_path


def arrays(root: Path, *names: str) -> list[dict]:
    return [read_model(root / n) for n in names]


def test_more_files_than_may_be_open_at_first(tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    save_family(tmp_path, 30, SHAPES, shards=3)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 40, before[1]))
    try:
        assert merge(tmp_path, models=[f"m{t}" for t in range(30)]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(read_model(tmp_path / "out")) == len(SHAPES)


# --- what needs no merge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["merge", "--help"], ["task", "--help"], ["--version"]])
def test_help_does_not_start_jax(argv):
    code = (
        "import sys; from tadrop_jax.cli import main; code = main(sys.argv[1:]); "
        "heavy = sorted({'jax', 'flax', 'numpy', 'rich', 'yaml'} & set(sys.modules)); "
        "print(f'{code} {heavy}', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stderr == "0 []\n"
    assert "tadrop" in done.stdout


@pytest.mark.parametrize("name", ["merge", "convert"])
def test_help_is_wrapped_but_for_examples(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    assert main([name, "--help"]) == 0
    told, examples = capsys.readouterr().out.split("Examples:\n")
    assert max(map(len, told.splitlines())) <= 70
    assert all(line.startswith("  tadrop ") for line in examples.splitlines())


def test_methods_lists_every_method_and_parameter():
    done = command("methods", COLUMNS="200")
    assert done.returncode == 0
    for method in registry.METHODS.values():
        assert method.name in done.stdout
        for parameter in method.parameters:
            assert f"{parameter.name} = " in done.stdout
    one = command("methods", "ties", COLUMNS="200")
    assert "preset (authors, mergekit, peft," in one.stdout
    assert all(line == line.rstrip() for line in (done.stdout + one.stdout).splitlines())
    assert "tadrop" not in one.stdout


def test_an_unknown_method_or_no_command(capsys):
    assert main(["methods", "tise"]) == 2
    assert "there is no method 'tise' (did you mean 'ties'?); there are tadrop" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage: tadrop" in capsys.readouterr().out
    assert main(["mrge"]) == 2
    assert "mrge" in capsys.readouterr().err


# --- merges -------------------------------------------------------------------------------------------------------

RANDOM = jax.random.key(7, impl="threefry2x32")
MERGES = {
    "ta": (["--coefficient", ".4"], "task_arithmetic", lambda b, m: tj.merge(b, m, tj.task_arithmetic(0.4))),
    "ties": (["--density", ".3", "--coefficient", ".5"], "ties", lambda b, m: tj.merge(b, m, tj.ties(0.3, 0.5))),
    "flavour": (
        ["--set", "flavour=mergekit", "--set", "weights=[1, 0.5]", "--set", "combine=sum"],
        "ties",
        lambda b, m: tj.merge(b, m, tj.ties(flavour="mergekit", weights=[1, 0.5], combine="sum")),
    ),
    "tadrop": (
        ["--sparsify", "tadrop:q_low=.5,q_high=.9,norm=none,mapping=affine:.5,.1"],
        "ties",
        lambda b, m: tj.merge(b, m, tj.ties(None), sparsifier=tj.tadrop(0.5, 0.9, norm=None, mapping="affine:.5,.1")),
    ),
    "both trims": (
        ["--sparsify", "uniform:sparsity=.3", "--density", ".6"],
        "ties",
        lambda b, m: tj.merge(b, m, tj.ties(0.6), sparsifier=tj.uniform(0.3)),
    ),
    "dare": (
        ["--sparsify", "dare:density=[.5,.9]", "--seed", "7", "--set", "normalize=yes"],
        "task_arithmetic",
        lambda b, m: tj.merge(b, m, tj.task_arithmetic(normalize=True), sparsifier=tj.dare([0.5, 0.9]), key=RANDOM),
    ),
    "cabs": (
        ["--set", "n=1", "--set", "m=4", "--set", "order=[1,0]", "--set", "tail=drop"],
        "cabs",
        lambda b, m: tj.merge(b, m, tj.cabs(1, 4, order=[1, 0], tail="drop")),
    ),
    "conflict_aware": (
        ["--sparsify", "conflict_aware:sparsifier=n_m:m=8,order=[1,0]"],
        "average",
        lambda b, m: tj.merge(b, m, tj.average(), sparsifier=tj.conflict_aware(tj.n_m(3, 8), [1, 0])),
    ),
    "masked": (
        ["--include", "layer", "--include", "head", "--exclude", "bias$"],
        "task_arithmetic",
        lambda b, m: tj.merge(b, m, tj.task_arithmetic(0.3), include=["layer", "head"], exclude="bias$"),
    ),
}


@pytest.mark.parametrize("name", MERGES)
def test_equals_the_merge_in_memory(name, root):
    """Every kind of option, through files, against the function of the same name."""
    options, method, expected = MERGES[name]
    assert merge(root, *options, method=method) == 0
    base, *models = arrays(root, "base", "m0", "m1")
    merged, wanted = read_model(root / "out"), expected(base, models)
    assert merged.keys() == base.keys()
    for tensor, value in merged.items():
        np.testing.assert_array_equal(value != base[tensor], np.asarray(wanted[tensor]) != base[tensor])
        np.testing.assert_allclose(value, wanted[tensor], rtol=2e-6, atol=1e-6, err_msg=tensor)
    assert not (root / "out.partial").exists()


def test_in_a_process_of_its_own(root, monkeypatch):
    """Also keeps what it compiled for the next run, in the user's cache."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    argv = ["merge", "--base", "base", "--models", "m0", "m1", "--method", "ties", "--density", "1", "--out", "out"]
    done = command(*argv, cwd=root, XDG_CACHE_HOME=str(root / "cache"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "out: 3 tensors merged, 0 from the base, in" in done.stdout
    assert list((root / "cache" / "tadrop_jax" / "compiled").iterdir())
    base, *models = arrays(root, "base", "m0", "m1")
    np.testing.assert_allclose(
        read_model(root / "out")["layer/bias"], tj.merge(base, models, tj.ties(1.0))["layer/bias"], rtol=1e-6
    )


RECIPE = """
base: base
models: [m0, m1]
method: ties
parameters: {density: null, coefficient: 0.5, weights: [1.0, 0.5]}
sparsify: {name: tadrop, parameters: {q_low: 0.5}}
exclude: bias
seed: 3
"""


def test_a_recipe_says_what_the_options_say(root, monkeypatch):
    (root / "recipe.yaml").write_text(RECIPE)
    assert main(["merge", str(root / "recipe.yaml"), "--out", str(root / "by recipe")]) == 0
    options = ["--coefficient", "0.5", "--set", "weights=1,.5", "--sparsify", "tadrop:q_low=.5"]
    assert merge(root, *options, "--exclude", "bias", "--seed", "3", method="ties") == 0
    assert files_of(root / "by recipe") == files_of(root / "out")
    assert report_of(root / "by recipe")["recipe"] == report_of(root / "out")["recipe"]
    # Options that do not say what to merge may go with a recipe, and win.
    monkeypatch.chdir(root)
    assert main(["merge", "recipe.yaml", "--exclude", "kernel", "--dtype", "float16", "--out", "third"]) == 0
    third = read_model(root / "third")
    assert {v.dtype for v in third.values()} == {np.dtype(np.float16)}
    assert (third["layer/kernel"] == arrays(root, "base")[0]["layer/kernel"].astype(np.float16)).all()


def test_it_says_that_trimming_is_off(root, capsys):
    said = "ties: its own trimming is off, since a sparsifier is given without a density\n"
    assert merge(root, "--sparsify", "tadrop", method="ties") == 0
    assert capsys.readouterr().err == said
    assert report_of(root / "out")["recipe"]["parameters"]["density"] is None
    for number, options in enumerate(
        [["--sparsify", "tadrop", "--density", ".5"], ["--sparsify", "tadrop", "--set", "density=.5"], []]
    ):
        assert merge(root, *options, method="ties", out=f"out{number}") == 0
        assert capsys.readouterr().err == ""
        assert report_of(root / f"out{number}")["recipe"]["parameters"]["density"] == (0.5 if options else 0.2)
    for number, (density, told) in enumerate((("", said), ("density: null", ""))):  # of a recipe alike
        lines = ["base: base", "models: [m0, m1]", "method: ties", "sparsify: tadrop", f"parameters: {{{density}}}"]
        (root / "recipe.yaml").write_text("\n".join(lines))
        assert main(["merge", str(root / "recipe.yaml"), "--out", str(root / f"by recipe {number}")]) == 0
        assert capsys.readouterr().err == told


def test_quiet_says_nothing(root, capsys):
    assert merge(root, "--sparsify", "tadrop", "--quiet", method="ties") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_storage_dtypes(dtype, tmp_path):
    base, models = save_family(tmp_path, 2, SHAPES, DTYPES[dtype])
    assert merge(tmp_path, "--density", ".5", method="ties") == 0
    merged, wanted = read_model(tmp_path / "out"), tj.merge(base, models, tj.ties(0.5))
    for name, value in merged.items():
        assert value.dtype == DTYPES[dtype]
        np.testing.assert_allclose(value.astype(np.float32), np.asarray(wanted[name], np.float32), rtol=8e-3)
    assert merge(tmp_path, "--density", ".5", "--dtype", "float32", method="ties", out="wide") == 0
    for name, value in read_model(tmp_path / "wide").items():
        assert value.dtype == np.float32
        assert (value.astype(DTYPES[dtype]) == merged[name]).all()


# --- files --------------------------------------------------------------------------------------------------------


def test_sharded_in_and_out(tmp_path):
    base, models = save_family(tmp_path / "sharded", 2, SHAPES, shards=2)
    save_family(tmp_path / "whole", 2, SHAPES)
    assert merge(tmp_path / "sharded") == 0
    assert merge(tmp_path / "whole", "--max-shard-size", "0.4KB") == 0
    assert merge(tmp_path / "whole", "--workers", "1", out="plain") == 0
    files = sorted(f.name for f in (tmp_path / "whole" / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / "whole" / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == SHAPES.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in base.values())
    for name, file in index["weight_map"].items():
        assert name in read_model(tmp_path / "whole" / "out" / file)
    one, two, three = arrays(tmp_path, "sharded/out", "whole/out", "whole/plain")
    for name in SHAPES:
        assert one[name].tobytes() == two[name].tobytes() == three[name].tobytes()
    # What was written can be merged again.
    again = ["--base", str(tmp_path / "whole/out"), "--models", str(tmp_path / "whole/m0")]
    assert main(["merge", *again, "--method", "average", "--out", str(tmp_path / "again")]) == 0
    np.testing.assert_allclose(read_model(tmp_path / "again")["head.weight"], models[0]["head.weight"], rtol=1e-5)


def test_single_files_in_and_out(root, tmp_path):
    assert merge(root, models=("m0/model.safetensors", "m1")) == 0
    assert merge(root, models=("m0/model.safetensors", "m1"), out="one.safetensors") == 0
    beside = sorted(f.name for f in root.glob("one*"))
    assert beside == ["one.config.json", "one.merge_report.json", "one.safetensors"]
    for name, value in read_model(root / "one.safetensors").items():
        assert value.tobytes() == read_model(root / "out")[name].tobytes()
    assert report_of(root / "out")["tasks"] == ["model", "m1"]


def test_the_configuration_beside_a_single_base_comes_along(root, capsys):
    (root / "base" / "tokenizer.json").write_text("{}")
    base, models = str(root / "base" / "model.safetensors"), [str(root / "m0"), str(root / "m1")]
    assert main(["merge", "--base", base, "--models", *models, "--method", "average", "--out", str(root / "out")]) == 0
    assert sorted(files_of(root / "out")) == ["config.json", "model.safetensors"]
    assert "config.json" not in capsys.readouterr().out


def test_the_files_beside_a_result_in_one_file_are_read_back(root, tmp_path):
    """Of `one.safetensors` they are `one.config.json` and so on; `one.two.safetensors` has its own."""
    (root / "base" / "tokenizer.json").write_text('{"of": "base"}')
    assert merge(root, out="one.safetensors") == 0
    for name, text in (("config.json", '{"model_type": "other"}'), ("one.two.vocab.txt", "another's")):
        (root / name).write_text(text)
    save_file({"w": np.ones(1, np.float32)}, root / "one.two.safetensors")
    again = ["--base", str(root / "one.safetensors"), "--models", str(root / "m0"), "--method", "average"]
    assert main(["merge", *again, "--out", str(root / "again")]) == 0
    assert main(["merge", *again, "--out", str(root / "again.safetensors")]) == 0
    assert sorted(files_of(root / "again")) == ["config.json", "model.safetensors", "tokenizer.json"]
    for name in ("config.json", "tokenizer.json"):
        wanted = (root / "base" / name).read_bytes()
        assert wanted == (root / "again" / name).read_bytes() == (root / f"again.{name}").read_bytes()


def test_what_lies_beside_a_single_file_is_not_overwritten(root, capsys):
    (root / "one.config.json").write_text("of something else")
    assert merge(root, out="one.safetensors") == 2
    assert "one.config.json: exists already" in capsys.readouterr().err
    assert (root / "one.config.json").read_text() == "of something else"
    assert not list(root.glob("one.safetensors*"))
    (root / "one.config.json").unlink()
    assert merge(root, out="one.safetensors") == 0
    assert sorted(f.name for f in root.glob("one*")) == ["one.config.json", "one.merge_report.json", "one.safetensors"]


@pytest.mark.parametrize(("text", "said"), [("{", "is not valid JSON"), ("[]", "holds no configuration")])
def test_a_damaged_configuration_is_told_before_it_is_given_a_dtype(root, capsys, text, said):
    (root / "base" / "config.json").write_text(text)
    assert merge(root, "--dtype", "bfloat16", out="one.safetensors") == 2
    assert f"config.json: {said}" in capsys.readouterr().err


def test_a_result_that_transformers_cannot_open_is_said_to_be_one(tmp_path, capsys):
    root = tmp_path
    save_family(root, 2, {"layer.weight": (5, 4)}, config={"model_type": "vit"})
    for out in ("with", "with.safetensors"):
        assert merge(root, out=out) == 0
        assert "config.json" not in capsys.readouterr().out
    (root / "base" / "config.json").unlink()
    for out in ("without", "without.safetensors"):
        assert merge(root, out=out) == 0
        assert "no config.json beside the base" in capsys.readouterr().out


def test_configuration_and_tokenizer_come_along(root):
    base = root / "base"
    (base / "config.json").write_text(json.dumps({"model_type": "vit", "torch_dtype": "float32"}))
    (base / "tokenizer.json").write_text("{}")
    (base / "merges.txt").write_text("a b")
    (base / "optimizer.pt").write_text("state")
    (base / "merge_report.json").write_text("of an earlier merge")
    assert merge(root, "--dtype", "bfloat16") == 0
    assert sorted(f.name for f in (root / "out").iterdir()) == [
        "config.json",
        "merge_report.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
    ]
    described = json.loads((root / "out" / "config.json").read_text())
    assert described == {"model_type": "vit", "torch_dtype": "bfloat16"}
    assert {v.dtype for v in read_model(root / "out").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert report_of(root / "out")["recipe"]["dtype"] == "bfloat16"


TIED = {"transformer.wte.weight": (11, 4), "transformer.ln_f.weight": (4,)}


def save_tied(root: Path, stored=("base", "m0", "m1")) -> tuple[dict, list[dict]]:
    """GPT-2's embedding, stored a second time as the head."""
    base, models = family(2, TIED)
    for name, tensors in zip(("base", "m0", "m1"), (base, *models), strict=True):
        head = {"lm_head.weight": tensors["transformer.wte.weight"].copy()} if name in stored else {}
        save_model(root / name, tensors | head, config={"model_type": "gpt2"})
    return base, models


@pytest.mark.parametrize("stored", [("base", "m0", "m1"), ("base",), ("m1",)])
def test_tied_weights_count_once(stored, tmp_path):
    """A threshold over the tree would move if the copy counted; the result holds the embedding once."""
    base, models = save_tied(tmp_path, stored)
    assert merge(tmp_path, "--density", ".3", method="ties") == 0
    merged, wanted = read_model(tmp_path / "out"), tj.merge(base, models, tj.ties(0.3))
    assert merged.keys() == TIED.keys()
    for name, value in merged.items():
        np.testing.assert_array_equal(value != base[name], np.asarray(wanted[name]) != base[name])
        np.testing.assert_allclose(value, wanted[name], rtol=1e-6)
    rows = report_of(tmp_path / "out")["tensors"]
    assert rows.get("lm_head.weight") == ({"tied_to": "transformer.wte.weight"} if "base" in stored else None)


def test_what_excludes_a_copy_excludes_the_tied_tensor(tmp_path):
    """The result holds it once, so that the head could not stay the base's while the embedding merges."""
    base, _ = save_tied(tmp_path)
    assert merge(tmp_path, "--exclude", "lm_head") == 0
    merged = read_model(tmp_path / "out")
    np.testing.assert_array_equal(merged["transformer.wte.weight"], base["transformer.wte.weight"])
    assert np.any(merged["transformer.ln_f.weight"] != base["transformer.ln_f.weight"])


def test_a_pattern_of_a_rule_matches_a_tied_tensor_by_its_copy(tmp_path):
    base, models = save_tied(tmp_path)
    assert merge(tmp_path, "--set", "mean_only=lm_head", method="tsv_m") == 0
    expected = tj.merge(base, models, tj.average())
    for name, value in read_model(tmp_path / "out").items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)


@pytest.mark.parametrize("pattern", ["lm_head", "wte"])
def test_a_tied_tensor_stays_each_tasks_own_by_any_of_its_names(pattern, tmp_path):
    """Once, as the result holds it, and not the base's in silence."""
    _, models = save_tied(tmp_path)
    assert merge(tmp_path, "--set", f"per_task={pattern}", method="emr") == 0
    assert main(["task", str(tmp_path / "out"), "--task", "m1", "--out", str(tmp_path / "m1 again")]) == 0
    found = read_model(tmp_path / "m1 again")
    assert found.keys() == TIED.keys()
    np.testing.assert_array_equal(found["transformer.wte.weight"], models[1]["transformer.wte.weight"])


def test_a_pattern_of_a_rule_may_match_what_is_excluded(tmp_path):
    base, _ = save_tied(tmp_path, ())
    assert merge(tmp_path, "--set", "mean_only=ln_f", "--exclude", "ln_f", method="tsv_m") == 0
    np.testing.assert_array_equal(
        read_model(tmp_path / "out")["transformer.ln_f.weight"], base["transformer.ln_f.weight"]
    )


def test_a_head_that_was_untied_is_a_tensor_of_its_own(tmp_path):
    """One fine-tune trained its head apart from the embedding: what it learnt must not be dropped in silence."""
    save_tied(tmp_path)
    tensors = read_model(tmp_path / "m1")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / "m1" / "model.safetensors")
    assert merge(tmp_path, "--set", "coefficient=1.0") == 0
    merged = read_model(tmp_path / "out")
    base, first, second = arrays(tmp_path, "base", "m0", "m1")
    wanted = first["lm_head.weight"] + second["lm_head.weight"] - base["lm_head.weight"]
    np.testing.assert_allclose(merged["lm_head.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_integer_tensors_come_from_the_base(root):
    for t, name in enumerate(("base", "m0", "m1")):
        tensors = read_model(root / name)
        tensors |= {"position_ids": np.arange(5) + t, "mask": np.array([True, t == 0])}
        save_file(tensors, root / name / "model.safetensors")
    assert merge(root) == 0
    merged = read_model(root / "out")
    np.testing.assert_array_equal(merged["position_ids"], np.arange(5))
    assert merged["position_ids"].dtype == np.int64
    np.testing.assert_array_equal(merged["mask"], [True, True])
    assert report_of(root / "out")["tensors"]["position_ids"] == {"from": "base", "because": "int64 tensor"}
    assert merge(root, "--dtype", "bfloat16", out="narrow") == 0
    assert read_model(root / "narrow")["position_ids"].dtype == np.int64


def test_what_is_excluded_may_differ_or_be_missing(root, capsys):
    tensors = read_model(root / "m0")
    tensors["head.weight"] = np.ones((5, 9), np.float16)
    save_file(tensors, root / "m0" / "model.safetensors")
    tensors = read_model(root / "m1")
    del tensors["head.weight"]
    save_file(tensors, root / "m1" / "model.safetensors")
    assert merge(root) == 2
    capsys.readouterr()
    assert merge(root, "--exclude", "^head", "--density", ".4", method="ties") == 0
    base, *models = arrays(root, "base", "m0", "m1")
    merged = read_model(root / "out")
    assert merged["head.weight"].tobytes() == base["head.weight"].tobytes()
    wanted = tj.merge(base, models, tj.ties(0.4), exclude="^head")
    np.testing.assert_allclose(merged["layer/kernel"], wanted["layer/kernel"], rtol=1e-6)
    assert report_of(root / "out")["tensors"]["head.weight"] == {"from": "base", "because": "excluded"}


def test_the_report(root):
    assert merge(root, "--sparsify", "tadrop", "--digests", "--seed", "5", method="ties") == 0
    report = report_of(root / "out")
    recipe = report["recipe"]
    assert recipe["base"] == str(root / "base")
    assert recipe["models"] == [str(root / "m0"), str(root / "m1")]
    assert (recipe["method"], recipe["seed"], recipe["dtype"]) == ("ties", 5, None)
    assert recipe["sparsify"]["parameters"]["q_low"] == 0.95
    assert recipe["parameters"]["coefficient"] == 1.0
    assert report["versions"]["jax"] == jax.__version__
    assert report["tasks"] == ["m0", "m1"]
    assert report["warnings"] == []
    for described, name in zip(report["inputs"], ("base", "m0", "m1"), strict=True):
        file = root / name / "model.safetensors"
        assert described["path"] == str(root / name)
        assert described["bytes"] == file.stat().st_size
        assert len(described["header_sha256"]) == 64
        digest = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]
        assert described["sha256"] == digest
    base, *models = arrays(root, "base", "m0", "m1")
    stack = tj.task_vectors(base, models)
    ratios, sparse = tj.quantile_ratios(stack), tj.sparsify(stack, tj.tadrop())
    assert report["tensors"].keys() == SHAPES.keys()
    for name, row in report["tensors"].items():
        assert (tuple(row["shape"]), row["dtype"]) == (SHAPES[name], "float32")
        np.testing.assert_allclose(row["quantile_ratio"], ratios[name], rtol=1e-6)
        zeros = (np.asarray(sparse[name]) == 0).reshape(2, -1).mean(axis=1)
        np.testing.assert_allclose(row["sparsity"], zeros, atol=1e-6)
    assert merge(root, out="brief") == 0
    assert "sha256" not in report_of(root / "brief")["inputs"][0]
