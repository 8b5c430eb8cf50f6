"""Whole models through every format, byte for byte; other spellings, tied copies and buffers."""

import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import converters
from converters import ConversionError, families
from converters.files import open_tensors
from converters.mapping import Row, linear
from converters.vit import Config, ViTForImageClassification
from tests.converters.files.torch_files import save_legacy, save_zip, state_dict

TINY = Config(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
    num_channels=1,
    labels=("odd", "even", "neither"),
)


@pytest.fixture(scope="module")
def tiny():
    return ViTForImageClassification(TINY, rngs=nnx.Rngs(0))


@pytest.fixture
def directory(tiny, tmp_path):
    """A PyTorch directory in bfloat16, with a tokenizer."""
    converters.save(tmp_path / "vit", tiny)
    half = {n: a.astype(ml_dtypes.bfloat16) for n, a in converters.read_tensors(tmp_path / "vit").items()}
    (tmp_path / "vit" / "model.safetensors").unlink()
    converters.files.safetensors.write(tmp_path / "vit", half)
    config = (tmp_path / "vit" / "config.json").read_text()
    (tmp_path / "vit" / "config.json").write_text(config.replace("float32", "bfloat16"))
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"do_resize": true}')
    return tmp_path / "vit"


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("format", ["orbax", "safetensors", "msgpack", "npz"])
def test_torch_to_flax_to_torch_gives_the_same_files(format, directory, tmp_path):
    converters.convert(directory, tmp_path / "flax", to="flax", format=format)
    stored = open_tensors(tmp_path / "flax")
    assert stored.format == format
    kernel = np.asarray(stored.tensors["vit/encoder/layer/0/attention/attention/query/kernel"])
    query = converters.read_tensors(directory)["vit.encoder.layer.0.attention.attention.query.weight"]
    np.testing.assert_array_equal(kernel, query.T)
    assert contents(tmp_path / "flax")["preprocessor_config.json"] == b'{"do_resize": true}'
    module, params = converters.load(tmp_path / "flax")
    assert params["classifier"]["kernel"].dtype == ml_dtypes.bfloat16
    assert module.config == TINY

    converters.convert(tmp_path / "flax", tmp_path / "back", to="torch")
    assert contents(tmp_path / "back") == contents(directory)
    converters.save(tmp_path / "saved", module)
    name = "model.safetensors"
    assert contents(tmp_path / "saved")[name] == contents(directory)[name]


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_pickles_are_converted(save, directory, tmp_path):
    before = contents(directory)
    save(directory / "pytorch_model.bin", {"model": state_dict(converters.read_tensors(directory))})
    (directory / "model.safetensors").unlink()
    converters.convert(directory, tmp_path / "flax", to="flax")
    converters.convert(tmp_path / "flax", tmp_path / "back", to="torch")
    assert contents(tmp_path / "back") == before
    converters.convert(directory / "pytorch_model.bin", tmp_path / "again", to="torch", max_shard_size=1000)
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    assert sorted(open_tensors(tmp_path / "again").tensors) == sorted(open_tensors(directory).tensors)


def test_a_bare_tree_of_a_model_is_loaded_by_its_configuration(tiny, tmp_path):
    """What a user saved with Orbax, of NNX and without our note."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(tiny, nnx.Param))
    with pytest.raises(ConversionError, match="names do not tell the architecture"):
        converters.load(tmp_path / "state")
    module, _ = converters.load(tmp_path / "state", config=TINY, architecture="ViTForImageClassification")
    np.testing.assert_array_equal(module.classifier.kernel[...], tiny.classifier.kernel[...])


def test_a_given_configuration_goes_before_those_of_the_files(directory, tmp_path):
    """Of a directory of PyTorch, and of one of Flax, where `conversion.json` has one too; and it is what is written."""
    given = {**json.loads((directory / "config.json").read_text()), "num_attention_heads": 1}
    converters.convert(directory, tmp_path / "flax", to="flax", config=given)
    converters.convert(directory, tmp_path / "torch", to="torch", config=given)
    converters.convert(directory, tmp_path / "other", to="flax")
    assert converters.load(tmp_path / "other", config={"hidden_act": "relu"})[0].config.hidden_act == "relu"
    converters.convert(tmp_path / "other", tmp_path / "back", to="torch", config=given)
    for name in ("flax", "torch", "back"):
        assert converters.read_config(tmp_path / name / "config.json")["num_attention_heads"] == 1
        assert converters.load(tmp_path / name)[0].config.num_attention_heads == 1


def test_the_dtype_that_transformers_4_reads_is_that_of_the_weights(directory, tmp_path):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": config.pop("dtype")}))
    module, params = converters.load(directory)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    converters.save(tmp_path / "wide", wide, module.config, architecture="ViTForImageClassification")
    written = converters.read_config(tmp_path / "wide" / "config.json")
    assert written["torch_dtype"] == written["dtype"] == "float32"


def test_faults_in_a_tree_are_named_at_once(directory, tmp_path):
    converters.convert(directory, tmp_path / "flax", to="flax", format="npz")
    file = tmp_path / "flax" / "model.npz"
    arrays = {n: np.asarray(a) for n, a in open_tensors(file).tensors.items()}
    del arrays["classifier/bias"]
    arrays["vit/layernorm/scale"] = np.ones(3, np.float32)
    arrays["head/kernel"] = np.ones(3, np.float32)
    np.savez(file, **{n: a.astype(np.float32) for n, a in arrays.items()})
    with pytest.raises(ConversionError) as caught:
        converters.convert(tmp_path / "flax", tmp_path / "out", to="torch")
    assert len(caught.value.problems) == 3
    for word in ("classifier/bias", "vit/layernorm/scale", "head/kernel"):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "tensorflow"}, "to must be torch or flax, got 'tensorflow'"),
        ({"to": "torch", "format": "orbax"}, "format must be safetensors with torch, got 'orbax'"),
        ({"to": "flax", "format": "h5"}, "format must be orbax or safetensors or msgpack or npz with flax, got 'h5'"),
        ({"to": "flax", "architecture": "Nothing"}, "architecture Nothing is not supported"),
    ],
)
def test_requests_that_cannot_be_met(arguments, message, directory, tmp_path):
    with pytest.raises(ConversionError, match=message):
        converters.convert(directory, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConversionError, match="not empty"):
        converters.convert(directory, tmp_path / "full", to="flax")


class ToyConfig:
    """One number, and what else the file had."""

    def __init__(self, size: int):
        self.size = size

    @classmethod
    def from_dict(cls, raw):
        return cls(raw["size"])

    def to_dict(self):
        return {"size": self.size}


class Toy(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        self.fc = nnx.Linear(2, config.size, rngs=rngs)


@pytest.fixture
def toy(monkeypatch):
    """A family with everything that the protocol has; "other/Toy" is another layout of its module."""

    def table(config, architecture):
        return linear("body.fc", "fc") if architecture == "Toy" else [Row("w", "fc/kernel"), Row("b", "fc/bias")]

    package = types.SimpleNamespace(
        Config=ToyConfig,
        MODELS={"Toy": Toy, "other/Toy": Toy},
        table=table,
        aliases=lambda name: [(r"^fc\.", "body.fc."), ("gamma", "weight")] if name == "Toy" else [],
        tied=lambda config, name: {"tied.weight": "body.fc.weight"},
        buffers=lambda config, name: {r"mask(\d+)": lambda match: np.tril(np.ones((int(match[1]),) * 2))},
        configure=lambda raw, shapes, name: ToyConfig(shapes["b"][0] if name != "Toy" else raw["size"]),
        flax_table=lambda config, name: [Row("old/kernel", "fc/kernel"), Row("old/bias", "fc/bias")],
    )
    entries = {
        "Toy": families.Architecture("Toy", "toy", "numbers"),
        "other/Toy": families.Architecture("other/Toy", "toy", "numbers", marks=("^w$", "^b$")),
    }
    monkeypatch.setattr(families, "ARCHITECTURES", entries)
    monkeypatch.setattr(families, "package_of", lambda entry: package)
    return package


WEIGHT, BIAS = np.arange(6, dtype=np.float32).reshape(3, 2), np.arange(3, dtype=np.float32)
MASK = np.tril(np.ones((3, 3), bool))


def save_toy(folder, tensors, architecture="Toy"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"size": 3, "architectures": [architecture]}))
    converters.files.safetensors.write(folder, tensors)
    return folder


TOYS = {
    "plain": {"body.fc.weight": WEIGHT, "body.fc.bias": BIAS},
    "copy and buffers": {"body.fc.weight": WEIGHT, "body.fc.bias": BIAS, "tied.weight": WEIGHT, "mask3": MASK},
    "buffer in another dtype": {"body.fc.weight": WEIGHT, "body.fc.bias": BIAS, "mask3": MASK.astype(np.uint8)},
    "the copy alone": {"tied.weight": WEIGHT, "body.fc.bias": BIAS},
}


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("format", ["npz", "msgpack"])
def test_copies_and_buffers_come_back(name, format, toy, tmp_path):
    source = save_toy(tmp_path / "toy", TOYS[name])
    converters.convert(source, tmp_path / "flax", to="flax", format=format)
    names = {"npz": {"fc/kernel", "fc/bias"}, "msgpack": {"old/kernel", "old/bias"}}[format]
    assert open_tensors(tmp_path / "flax").tensors.keys() == names
    converters.convert(tmp_path / "flax", tmp_path / "back", to="torch")
    assert contents(tmp_path / "back") == contents(source)
    module, _ = converters.load(source)
    converters.save(tmp_path / "saved", module)
    assert contents(tmp_path / "saved")["model.safetensors"] == contents(source)["model.safetensors"]


@pytest.mark.parametrize("format", ["npz", "msgpack"])
def test_other_spellings_are_read_and_come_back(format, toy, tmp_path):
    tensors = {"fc.gamma": WEIGHT, "fc.bias": BIAS, "mask3": MASK, "tied.gamma": WEIGHT}
    source = save_toy(tmp_path / "toy", tensors)
    module, _ = converters.load(source)
    np.testing.assert_array_equal(module.fc.kernel[...], WEIGHT.T)
    converters.save(tmp_path / "saved", module)
    assert contents(tmp_path / "saved")["model.safetensors"] == contents(source)["model.safetensors"]
    converters.convert(source, tmp_path / "flax", to="flax", format=format)
    converters.convert(tmp_path / "flax", tmp_path / "back", to="torch")
    assert contents(tmp_path / "back") == contents(source)
    converters.convert(tmp_path / "flax", tmp_path / "other", to="torch", architecture="other/Toy")
    assert open_tensors(tmp_path / "other").tensors.keys() == {"w", "b"}
    module.origin = None
    converters.save(tmp_path / "plain", module, architecture="Toy")
    assert open_tensors(tmp_path / "plain").tensors.keys() == {"body.fc.weight", "body.fc.bias"}


def test_two_spellings_of_one_tensor_are_refused(toy, tmp_path):
    twice = save_toy(tmp_path / "twice", {"fc.gamma": WEIGHT, "fc.weight": WEIGHT, "fc.bias": BIAS})
    with pytest.raises(
        ConversionError, match=r"fc\.weight and fc\.gamma are both body\.fc\.weight|fc\.gamma and fc\.w"
    ):
        converters.load(twice)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"names": [["body.fc.weight", "x"], ["body.fc.bias", "x"]]}, "two tensors one name"),
        ({"names": [["body.fc.weight", "body.fc.bias"]]}, "would have one name"),
        ({"names": [["body.fc.weight"]]}, r"conversion\.json: .* must hold pairs"),
        ({"stored": 3}, r"conversion\.json: .* must hold pairs"),
    ],
)
def test_a_note_that_was_changed_loses_no_tensor(entries, told, toy, tmp_path):
    source = save_toy(tmp_path / "toy", TOYS["plain"])
    converters.convert(source, tmp_path / "flax", to="flax", format="npz")
    note = json.loads((tmp_path / "flax" / "conversion.json").read_text())
    (tmp_path / "flax" / "conversion.json").write_text(json.dumps(note | entries))
    with pytest.raises(ConversionError, match=told):
        converters.convert(tmp_path / "flax", tmp_path / "back", to="torch")
    assert not (tmp_path / "back").exists()


def test_copies_and_buffers_that_are_not_what_they_must_be(toy, tmp_path):
    wrong = {"body.fc.weight": WEIGHT, "body.fc.bias": BIAS, "tied.weight": -WEIGHT, "mask3": ~MASK, "x": BIAS}
    with pytest.raises(ConversionError) as caught:
        converters.load(save_toy(tmp_path / "toy", wrong))
    assert len(caught.value.problems) == 3
    for line in ("differs from it: tied.weight", "the model computes: mask3", "unmapped: x"):
        assert line in str(caught.value)


def test_one_layout_becomes_another(toy, tmp_path):
    source = save_toy(tmp_path / "toy", TOYS["copy and buffers"])
    converters.convert(source, tmp_path / "other", to="torch", architecture="other/Toy")
    found = converters.read_tensors(tmp_path / "other")
    assert found.keys() == {"w", "b"}
    np.testing.assert_array_equal(found["w"], WEIGHT.T)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["architectures"] == ["other/Toy"]
    (tmp_path / "other" / "config.json").unlink()
    module, _ = converters.load(tmp_path / "other")  # told by the tensors' names, configured by their shapes
    assert module.origin.architecture == "other/Toy"
    converters.convert(tmp_path / "other", tmp_path / "back", to="torch", architecture="Toy")
    assert open_tensors(tmp_path / "back").tensors.keys() == {"body.fc.weight", "body.fc.bias"}


@pytest.mark.peers
def test_transformers_opens_what_went_through_flax(directory, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    converters.convert(directory, tmp_path / "flax", to="flax")
    converters.convert(tmp_path / "flax", tmp_path / "back", to="torch")
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert str(model.dtype) == "torch.bfloat16"
