"""Every architecture of the registry: there and back gives the same names, shapes, dtypes and bytes; faults are named.

A new architecture of a package that is in CONFIGURATIONS is covered without a change here.
"""

import functools
import json
import re

import ml_dtypes
import numpy as np
import pytest

import converters
from converters import ConversionError, families
from converters.files import open_tensors
from converters.loading import abstract
from converters.mapping import flatten, nest, translate
from converters.names import Origin, restored

_WIDTHS = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGE = {"image_size": 8, "patch_size": 4}
_TEXT = {"vocab_size": 11, "max_position_embeddings": 7}
_OF_BEIT = ("use_mask_token", "use_relative_position_bias", "use_shared_relative_position_bias")
# Tiny models: what Config.from_dict reads, for each package; an architecture that needs other fields has its own entry.
CONFIGURATIONS = {
    "converters.gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 7},
    "converters.vit": _WIDTHS | _IMAGE | {"layer_norm_eps": 1e-6},
    "timm/VisionTransformerDistilled": _WIDTHS | _IMAGE | {"layer_norm_eps": 1e-6, "distilled": True},
    "big_vision/ViT": _WIDTHS | _IMAGE | {"global_pool": "map", "class_token": False},
    "converters.beit": _WIDTHS | _IMAGE | dict.fromkeys(_OF_BEIT, True) | {"vocab_size": 11},
    "converters.clip": {
        "text_config": _WIDTHS | _TEXT,
        "vision_config": _WIDTHS | _IMAGE,
        "projection_dim": 6,
    },
    "converters.beit3": {
        "encoder_embed_dim": 8,
        "encoder_attention_heads": 2,
        "encoder_ffn_embed_dim": 12,
        "encoder_layers": 1,
        "img_size": 8,
        "patch_size": 4,
        "vocab_size": 11,
        "max_source_positions": 7,
    },
}
NAMES = list(families.ARCHITECTURES)


class Case:
    """A random model of an architecture; what its files hold, by the table alone."""

    def __init__(self, name: str):
        self.entry = families.architecture(name)
        self.package = families.package_of(self.entry)
        fields = CONFIGURATIONS.get(name) or CONFIGURATIONS.get(self.entry.package)
        assert fields, f"CONFIGURATIONS wants a tiny model of {self.entry.package}"
        self.config = self.package.Config.from_dict(fields)
        self.rows = self.package.table(self.config, name)
        self.shapes = flatten(abstract(self.package, self.config, self.entry))

    def leaves(self, dtype) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        return {path: rng.normal(size=leaf.shape).astype(dtype) for path, leaf in self.shapes.items()}

    def tensors(self, dtype) -> dict[str, np.ndarray]:
        """With all tied copies, and one of each kind of buffer."""
        copies = families.offered(self.package, "tied", {}, self.config, self.entry.name)
        stored = [(name, "") for name in copies]
        for pattern, make in families.offered(self.package, "buffers", {}, self.config, self.entry.name).items():
            name = re.sub(r"\\(.)", r"\1", re.sub(r"(\\d|\[0-9\])\+", "0", pattern))
            match = re.fullmatch(pattern, name)
            assert match, f"no name for the buffers {pattern}"
            stored.append((name, str(np.asarray(make(match)).dtype)))
        origin = Origin(self.entry.name, tuple(stored))
        found = translate(self.leaves(dtype), self.rows, forward=False)
        found = restored(found, self.package, self.entry, self.config, origin)
        return {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in found.items()}

    def write(self, folder, tensors):
        folder.mkdir()
        raw = self.config.to_dict() | {"architectures": [self.entry.name]}
        raw = families.offered(self.package, "describe", raw, self.config, self.entry.name)
        (folder / "config.json").write_text(json.dumps(raw))
        converters.files.safetensors.write(folder, tensors)
        return folder


case = functools.cache(Case)


def described(tensors) -> dict:
    arrays = {name: np.asarray(leaf) for name, leaf in tensors.items()}
    return {name: (array.shape, array.dtype, array.tobytes()) for name, array in arrays.items()}


CASES = [(name, np.float32, "msgpack") for name in NAMES] + [(name, ml_dtypes.bfloat16, "npz") for name in NAMES]


@pytest.mark.parametrize(("name", "dtype", "format"), [*CASES, (NAMES[0], np.float16, "safetensors")])
def test_there_and_back(name, dtype, format, tmp_path):
    """Read, loaded and saved; and by way of a Flax directory."""
    tensors = case(name).tensors(dtype)
    assert len(tensors) > 10
    source = case(name).write(tmp_path / "torch", tensors)
    module, _ = converters.load(source)
    assert type(module) is case(name).package.MODELS[name]
    assert module.origin.architecture == name
    assert module.config == case(name).config
    assert described(flatten(module)) == described(case(name).leaves(dtype))
    converters.save(tmp_path / "saved", module)
    converters.convert(source, tmp_path / "flax", to="flax", format=format)
    converters.convert(tmp_path / "flax", tmp_path / "back", to="torch", architecture=name)
    for folder in ("torch", "saved", "back"):
        assert described(open_tensors(tmp_path / folder).tensors) == described(tensors), folder


@pytest.mark.parametrize("name", NAMES)
def test_every_fault_is_named_at_once(name, tmp_path):
    tensors = case(name).tensors(np.float32)
    tied = families.offered(case(name).package, "tied", {}, case(name).config, name).values()
    learned = translate(case(name).leaves(np.float32), case(name).rows, forward=False)
    matrices = [n for n, array in learned.items() if array.ndim == 2 and n not in tied]
    lost, turned = matrices[0], matrices[-1]
    del tensors[lost]
    tensors[turned] = np.concatenate([tensors[turned]] * 2)
    tensors["nobody.asked.weight"] = np.zeros((2, 3), np.float32)
    with pytest.raises(ConversionError) as caught:
        converters.load(case(name).write(tmp_path / "bad", tensors))
    problems = caught.value.problems
    assert len(problems) >= 3
    for kind, tensor in (("missing: ", lost), ("wrong shape: ", turned), ("unmapped: ", "nobody.asked.weight")):
        assert any(kind in line and tensor in line for line in problems), (tensor, problems)
    assert name in str(caught.value)
    assert str(tmp_path / "bad") in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_do_not_fit_are_named_at_once(name, tmp_path):
    leaves = case(name).leaves(np.float32)
    paths = [path for path, array in leaves.items() if array.ndim == 2]
    del leaves[paths[0]]
    leaves[paths[-1]] = leaves[paths[-1]][:1]
    leaves["nobody/kernel"] = np.zeros((2, 3), np.float32)
    with pytest.raises(ConversionError) as caught:
        converters.save(tmp_path / "bad", nest(leaves), case(name).config, architecture=name)
    for path in (paths[0], paths[-1], "nobody/kernel"):
        assert any(path in line for line in caught.value.problems), (path, caught.value.problems)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("package", CONFIGURATIONS)
def test_bare_parameters_tell_their_architecture(package):
    """The first whose module has their paths."""
    for name in (name for name in NAMES if families.ARCHITECTURES[name].package == package):
        found = families.architecture_of(nest(case(name).leaves(np.float32)), case(name).config).name
        model = abstract(case(name).package, case(name).config, families.architecture(found))
        assert flatten(model).keys() == case(name).shapes.keys()
        assert NAMES.index(found) <= NAMES.index(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_one_to_one(name):
    """Each path comes from one row, and what is fused is told by `converters.fused`."""
    back = translate(case(name).leaves(np.float32), case(name).rows, forward=False)
    sizes = sum(array.size for array in back.values())
    assert sizes == sum(int(np.prod(leaf.shape)) for leaf in case(name).shapes.values())
    place = converters.layout(case(name).rows)
    one_to_one = {path: place(path) for path in case(name).shapes}
    fused = converters.fused(case(name).rows)
    for path, (tensor, order) in one_to_one.items():
        if tensor not in back:
            assert tensor == path
            assert fused
            continue
        array = case(name).leaves(np.float32)[path]
        assert np.array_equal(array.transpose(order) if order else array, back[tensor]), path
