"""The registry of families: every entry has what the protocol asks for, and is found by its configuration."""

import pytest

from converters import ConversionError
from converters.families import ARCHITECTURES, Architecture, architecture, architecture_of, detect, package_of
from converters.mapping import Row


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_entry_follows_the_protocol(name):
    entry = ARCHITECTURES[name]
    package = package_of(entry)
    assert name in package.MODELS
    assert callable(package.Config.from_dict)
    assert callable(package.Config.to_dict)
    assert callable(package.table)
    for optional in ("aliases", "tied", "buffers", "configure", "describe", "flax_table"):
        assert callable(getattr(package, optional, print)), optional


@pytest.mark.parametrize("package", sorted({entry.package for entry in ARCHITECTURES.values()}))
def test_every_model_of_a_package_is_registered(package):
    names = {entry.name for entry in ARCHITECTURES.values() if entry.package == package}
    assert set(package_of(Architecture("", package, "")).MODELS) == names


def test_a_configuration_names_its_architecture():
    assert detect({"architectures": ["ViTForImageClassification"]}).package == "converters.vit"
    with pytest.raises(ConversionError, match=r"x/config.json: architecture BertModel is not supported.*ViTFor"):
        detect({"architectures": ["BertModel"]}, where="x/config.json")
    with pytest.raises(ConversionError, match=r"model_type 'bert' is not supported.*names do not tell"):
        detect({"model_type": "bert"}, ["bert.pooler.dense.weight"])
    with pytest.raises(ConversionError, match="architecture Nothing is not supported"):
        architecture("Nothing")


def test_a_configuration_of_ours_tells_the_architecture_of_bare_parameters():
    config = package_of(architecture("ViTModel")).Config(other={"architectures": ["ViTModel"]})
    assert architecture_of({}, config).package == "converters.vit"
    with pytest.raises(ConversionError, match="pass architecture="):
        architecture_of({}, object())


def test_rows_are_rows():
    vit = package_of(architecture("ViTForImageClassification"))
    assert all(isinstance(row, Row) for row in vit.table(vit.Config(), "ViTForImageClassification"))
