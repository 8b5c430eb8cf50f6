"""Requests, recipes and outputs that are wrong: exit code 2, one message that says what to do, and nothing written."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tadrop_jax.cli import main
from tests.helpers import family, files_of, merge, refused, save_family, save_model

SHAPES = {"layer/kernel": (12, 5), "layer/bias": (5,)}


@pytest.fixture
def root(tmp_path) -> Path:
    """Directories base, m0 and m1."""
    save_family(tmp_path, 2, SHAPES)
    return tmp_path


REQUESTS = {
    "density above 1": (["--density", "1.5"], "ties", ["density", "[0, 1]", "1.5"]),
    "density below 0": (["--density", "-0.1"], "ties", ["density", "[0, 1]", "-0.1"]),
    "density no number": (["--density", "much"], "ties", ["density", "number", "much"]),
    "density is NaN": (["--density", "nan"], "ties", ["density", "[0, 1]", "nan"]),
    "density of a sparsifier": (["--sparsify", "dare:density=2"], "ties", ["dare", "density", "[0, 1]", "2"]),
    "density of a rule without": (
        ["--density", ".2"],
        "task_arithmetic",
        ["task_arithmetic", "density", "coefficient"],
    ),
    "unknown parameter": (["--set", "densty=.2"], "ties", ["ties", "densty", "density"]),
    "unknown parameter of a sparsifier": (["--sparsify", "tadrop:q=.2"], "ties", ["tadrop", "'q'", "q_low"]),
    "no value": (["--set", "density"], "ties", ["NAME=VALUE", "density"]),
    "value of the wrong kind": (["--set", "n=many"], "cabs", ["n", "whole number", "many"]),
    "value that is no option": (["--set", "combine=median"], "ties", ["combine", "mean, sum, max", "median"]),
    "flag": (["--set", "normalize=maybe"], "task_arithmetic", ["normalize", "true or false", "maybe"]),
    "n above m": (["--set", "n=5", "--set", "m=4"], "cabs", ["n", "[0, 4]", "5"]),
    "too few weights": (["--set", "weights=1,"], "average", ["weights"]),
    "too many weights": (["--set", "weights=1,2,3"], "average", ["weights", "3", "2"]),
    "order is no permutation": (["--set", "order=[0,2]"], "cabs", ["order", "permutation", "[0, 2]"]),
    "unknown method": ([], "tise", ["tise", "ties", "task_arithmetic"]),
    "a sparsifier as the method": ([], "tadrop", ["tadrop", "merge rule"]),
    "unknown sparsifier": (["--sparsify", "drop"], "ties", ["drop", "tadrop"]),
    "a rule as the sparsifier": (["--sparsify", "ties"], "ties", ["ties", "sparsifier", "tadrop"]),
    "include matches nothing": (["--include", "attention"], "ties", ["attention", "matches none", "layer/kernel"]),
    "exclude matches nothing": (["--exclude", "attention"], "ties", ["attention", "matches none", "layer/kernel"]),
    "per_task matches nothing": (["--set", "per_task=head"], "emr", ["head", "matches none", "layer/kernel"]),
    "mean_only matches nothing": (["--set", "mean_only=head"], "tsv_m", ["head", "matches none", "layer/kernel"]),
    "all is excluded": (["--exclude", "layer"], "ties", ["no float tensor", "excluded"]),
    "include is no regex": (["--include", "layer["], "ties", ["layer[", "regular expression"]),
    "exclude is no regex": (["--exclude", "*bias"], "ties", ["*bias", "regular expression"]),
    "per_task is no regex": (["--set", "per_task=("], "emr", ["(", "regular expression"]),
    "shard size": (["--max-shard-size", "big"], "ties", ["--max-shard-size", "500MB", "big"]),
    "shard size of nothing": (["--max-shard-size", "0"], "ties", ["--max-shard-size", "'0'"]),
    "shard size without end": (["--max-shard-size", "infGB"], "ties", ["--max-shard-size", "infGB"]),
    "workers": (["--workers", "0"], "ties", ["--workers", "at least 1", "0"]),
    "a density twice": (["--density", ".2", "--set", "density=.3"], "ties", ["density is given twice"]),
    "a parameter set twice": (["--set", "combine=sum", "--set", "combine=max"], "ties", ["combine is given twice"]),
    "a sparsifier's twice": (["--sparsify", "tadrop:q_low=.5,q_low=.6"], "ties", ["tadrop", "q_low is given twice"]),
    "a seed of 65 bits": (["--seed", f"{2**63}"], "dare_linear", ["seed", "[-2^63, 2^63 - 1]", f"{2**63}"]),
    "a second coefficient": (["--coefficient", ".5", ".3"], "ties", ["'.3' is taken for a recipe", "--coefficient"]),
    "nothing to resume": (["--resume"], "ties", ["out.partial", "nothing to resume"]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_that_cannot_be_done(name, root, capsys):
    options, method, words = REQUESTS[name]
    refused(root, capsys, merge(root, *options, method=method), *words)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--dtype", "int8"], "int8"),
        (["--workers", "some"], "some"),
        (["--seed", "x"], "'x'"),
        (["--densty", ".2"], "tadrop merge: error: unrecognized arguments: --densty (did you mean '--density'?)"),
        (["--sparsifier=tadrop"], "--sparsifier=tadrop (did you mean '--sparsify'?)"),
    ],
    ids=lambda v: str(v),
)
def test_options_that_do_not_parse(options, word, root, capsys):
    assert merge(root, *options) == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
    assert not (root / "out").exists()


def test_a_required_option_that_is_misspelt(capsys):
    assert main(["merge", "--base", "b", "--models", "m", "--method", "ties", "--output", "x"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("required: --out; unrecognized: --output (did you mean '--out'?)")
    assert main(["merge", "--base", "b", "--meth", "ties"]) == 2
    assert capsys.readouterr().err.endswith("required: --out\n")


def test_missing_options_are_named(root, capsys):
    assert main(["merge", "--base", str(root / "base"), "--out", str(root / "out")]) == 2
    assert "--models, --method must be given" in capsys.readouterr().err


def test_a_file_that_holds_no_tensors(root, capsys):
    for name in ("config.json", "model.safetensors.index.json"):
        (root / "m0" / name).write_text("{}")
        said = f"{root / 'm0' / name}: tells of tensors and holds none; give its directory, {root / 'm0'}"
        refused(root, capsys, merge(root, models=(f"m0/{name}", "m1")), said)


def test_an_output_that_is_not_empty(root, capsys):
    (root / "out").mkdir()
    (root / "out" / "mine.txt").write_text("keep me")
    assert merge(root) == 2
    assert f"{root / 'out'}: exists already and is not empty" in capsys.readouterr().err
    assert files_of(root / "out") == {"mine.txt": b"keep me"}
    assert not (root / "out.partial").exists()


def test_shards_of_one_file(root, capsys):
    assert merge(root, "--out", str(root / "out.safetensors"), "--max-shard-size", "1GB") == 2
    assert f"--max-shard-size is for directories of safetensors files, and {root / 'out.safetensors'} is one file" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["out.bin", "out.pt", "out.npz"])
def test_a_file_of_a_kind_that_is_not_written(name, root, capsys):
    assert merge(root, out=name) == 2
    assert f"{name}: what is written is a directory, or one .safetensors file, and no " in capsys.readouterr().err
    assert not list(root.glob("out*"))


def test_one_shard_of_several_is_no_model(root, capsys):
    save_model(root / "m2", family(shapes=SHAPES)[1][1], shards=2)
    for models in (("m0", "m2/model-00001-of-00002.safetensors"), ("m2/model-00002-of-00002.safetensors", "m1")):
        assert merge(root, models=models) == 2
        assert f"safetensors: is one of 2 shards; give their directory, {root / 'm2'}" in capsys.readouterr().err
    assert merge(root, models=("m0", "m2")) == 0


def test_one_file_for_one_model_a_task(root, capsys):
    assert merge(root, method="emr", out="out.safetensors") == 2
    assert "out.safetensors: one model per task makes a bundle of several files" in capsys.readouterr().err
    assert not list(root.glob("out*"))


def test_an_output_that_is_a_file(root, capsys):
    (root / "out.safetensors").write_text("keep me")
    assert merge(root, "--out", str(root / "out.safetensors")) == 2
    assert f"{root / 'out.safetensors'}: exists already" in capsys.readouterr().err
    assert (root / "out.safetensors").read_text() == "keep me"


def test_an_empty_working_directory_is_an_output(root, monkeypatch):
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    assert merge(root, "--out", ".") == 0
    assert (root / "here" / "model.safetensors").is_file()


def test_what_the_system_refuses_is_said_in_one_line(root, capsys, monkeypatch):
    def refuse(self, *args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    models = [str(root / m) for m in ("m0", "m1")]
    argv = ["inspect", "--base", str(root / "base"), "--models", *models, "--quiet", "--json", str(root / "said.json")]
    assert main(argv) == 2
    assert capsys.readouterr().err == f"tadrop inspect: {root / 'said.json'}: Permission denied\n"


def test_a_file_that_does_not_fit_on_the_disk_goes_again(root, capsys, monkeypatch):
    def fill(self, text):
        self.write_bytes(b"{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fill)
    argv = ["inspect", "--base", str(root / "base"), "--models", str(root / "m0"), "--quiet"]
    assert main([*argv, "--json", str(root / "said.json")]) == 2
    assert capsys.readouterr().err == f"tadrop inspect: {root / 'said.json'}: No space left on device\n"
    assert not (root / "said.json").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_said_does_not_fit_on_the_disk(unbuffered):
    argv = [sys.executable, "-m", "tadrop_jax.cli", "methods", "ties"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr == "tadrop: the standard output cannot be written: No space left on device\n"


def test_an_output_without_a_parent(root, capsys):
    assert merge(root, "--out", str(root / "no" / "out")) == 2
    assert f"{root / 'no' / 'out'}: its parent directory does not exist" in capsys.readouterr().err
    assert not (root / "no").exists()


def test_an_output_that_is_an_input(root, capsys):
    before = files_of(root / "m0")
    assert merge(root, "--out", str(root / "m0")) == 2
    assert "not empty" in capsys.readouterr().err
    assert files_of(root / "m0") == before


def test_a_partial_directory_of_the_users(root, capsys):
    (root / "out.partial").mkdir()
    (root / "out.partial" / "mine.txt").write_text("keep me")
    assert merge(root) == 2
    said = capsys.readouterr().err
    assert "out.partial: exists and is not an unfinished merge" in said
    assert "--resume" not in said
    assert files_of(root / "out.partial") == {"mine.txt": b"keep me"}


RECIPES = {
    "not YAML": ("base: [", ["not valid YAML"]),
    "not text": (b"\xff\xfe\x00", ["not valid YAML"]),
    "no mapping": ("- base", ["mapping", "base", "models", "method"]),
    "empty": ("", ["mapping", "base"]),
    "unknown field": ("{base: base, models: [m0], method: ties, densty: 1}", ["unknown: densty", "parameters"]),
    "missing field": ("{base: base}", ["missing: models, method"]),
    "models is no list": ("{base: base, models: m0, method: ties}", ["models must be a list"]),
    "no base": ("{base: , models: [m0], method: ties}", ["paths of checkpoints", "None"]),
    "models as mergekit has them": (
        "{base: base, models: [{model: m0}], method: ties}",
        ["paths of checkpoints", "{'model': 'm0'}"],
    ),
    "no models": ("{base: base, models: [], method: ties}", ["models must be a list"]),
    "a mergekit recipe": ("{merge_method: passthrough, models: []}", ["passthrough", "is not read; of mergekit's"]),
    "unknown method": ("{base: base, models: [m0], method: tise}", ["tise", "ties"]),
    "unknown parameter": ("{base: base, models: [m0], method: ties, parameters: {densty: 1}}", ["densty", "density"]),
    "parameters are no mapping": ("{base: base, models: [m0], method: ties, parameters: [1]}", ["parameters", "[1]"]),
    "density": ("{base: base, models: [m0], method: ties, parameters: {density: 7}}", ["density", "[0, 1]", "7"]),
    "density is a word": ("{base: base, models: [m0], method: ties, parameters: {density: a}}", ["density", "'a'"]),
    "sparsifier": ("{base: base, models: [m0], method: ties, sparsify: drop}", ["drop", "tadrop"]),
    "sparsifier without a name": ("{base: base, models: [m0], method: ties, sparsify: {n: 1}}", ["sparsify", "name"]),
    "sparsifier parameters": (
        "{base: base, models: [m0], method: ties, sparsify: {name: tadrop, parameters: 3}}",
        ["parameters", "3"],
    ),
    "include": ("{base: base, models: [m0], method: ties, include: 3}", ["include", "3"]),
    "include is no regex": ("{base: base, models: [m0], method: ties, include: 'a['}", ["a[", "regular expression"]),
    "seed": ("{base: base, models: [m0], method: ties, seed: x}", ["seed", "'x'"]),
    "dtype": ("{base: base, models: [m0], method: ties, dtype: int8}", ["dtype", "'int8'"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_cannot_be_read(name, root, capsys):
    body, words = RECIPES[name]
    file = root / "recipe.yaml"
    file.write_bytes(body if isinstance(body, bytes) else body.encode())
    code = main(["merge", str(file), "--out", str(root / "out")])
    # What is out of range shows only when the method is made, which no longer knows where its parameters came from.
    refused(root, capsys, code, *(["recipe.yaml"] if not name.startswith("density") else []), *words)


def test_a_seed_of_65_bits(root, capsys):
    (root / "recipe.yaml").write_text(f"{{base: base, models: [m0], method: ties, seed: {-(2**63) - 1}}}")
    code = main(["merge", str(root / "recipe.yaml"), "--out", str(root / "out")])
    refused(root, capsys, code, "seed", "[-2^63, 2^63 - 1]")
    assert main(["inspect", "--base", f"{root / 'base'}", "--models", f"{root / 'm0'}", "--seed", f"{2**63}"]) == 2
    assert "tadrop inspect: seed must lie in" in capsys.readouterr().err


def test_a_recipe_that_is_not_there(root, capsys):
    code = main(["merge", str(root / "none.yaml"), "--out", str(root / "out")])
    refused(root, capsys, code, "none.yaml", "No such file")


def test_a_directory_in_the_place_of_a_recipe(root, capsys):
    code = main(["merge", str(root / "base"), "--out", str(root / "out")])
    refused(root, capsys, code, f"'{root / 'base'}' is taken for a recipe", "is a directory", "--base DIR")


def test_a_recipe_and_options_that_contradict(root, capsys):
    (root / "recipe.yaml").write_text("{base: base, models: [m0], method: ties}")
    code = main(["merge", str(root / "recipe.yaml"), "--method", "average", "--set", "a=1", "--out", str(root / "out")])
    refused(root, capsys, code, "--method", "--set")
