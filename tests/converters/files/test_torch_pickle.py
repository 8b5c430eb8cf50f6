"""Torch pickles: read without torch, mapped into memory, and never run."""

import zipfile

import ml_dtypes
import numpy as np
import pytest

from converters import ConversionError
from converters.files import open_tensors
from tests.converters.files.torch_files import Call, Storage, save_legacy, save_zip, state_dict, tensor

TENSORS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(5).astype(ml_dtypes.bfloat16),
    "steps": np.array(7, np.int64),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 3), np.float16),
}
SAVES = {"zip": save_zip, "legacy": save_legacy}


def read(file) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in open_tensors(file).tensors.items()}


def same(found, tensors) -> None:
    assert found.keys() == tensors.keys()
    for name, want in tensors.items():
        assert found[name].dtype == want.dtype
        assert found[name].shape == want.shape
        assert found[name].tobytes() == want.tobytes(), name


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pt"])
def test_both_formats_give_the_same_bytes(save, name, tmp_path):
    SAVES[save](tmp_path / name, state_dict(TENSORS))
    same(read(tmp_path / name), TENSORS)
    same(read(tmp_path), TENSORS)


def test_compressed_archives(tmp_path):
    save_zip(tmp_path / "model.pth", state_dict(TENSORS), zipfile.ZIP_DEFLATED)
    same(read(tmp_path / "model.pth"), TENSORS)


@pytest.mark.parametrize("save", SAVES)
def test_views_of_one_storage(save, tmp_path):
    storage = Storage("0", np.arange(12, dtype=np.float32))
    views = {
        "part": tensor(storage.array, offset=4, shape=(2, 3), storage=storage),
        "transposed": tensor(storage.array, shape=(4, 3), strides=(1, 4), storage=storage),
        "expanded": tensor(storage.array, shape=(2, 3), strides=(0, 1), storage=storage),
    }
    SAVES[save](tmp_path / "m.pth", views)
    flat = storage.array
    want = {"part": flat[4:10].reshape(2, 3), "transposed": flat.reshape(3, 4).T, "expanded": np.stack([flat[:3]] * 2)}
    same(read(tmp_path / "m.pth"), want)


@pytest.mark.parametrize("keys", [["model"], ["state_dict"], ["module"], ["model", "state_dict"]])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_nested_state_dicts_and_prefixes(keys, prefix, tmp_path):
    value = state_dict({prefix + name: array for name, array in TENSORS.items()})
    for key in reversed(keys):
        value = {"epoch": 3, "optimizer": {"state": {0: tensor(np.ones(3), "o")}}, key: value}
    save_zip(tmp_path / "m.pth", value)
    same(read(tmp_path / "m.pth"), TENSORS)


@pytest.mark.parametrize("save", SAVES)
def test_single_tensors_beside_a_state_dict(save, tmp_path):
    """PyTorch's own ImageNet example stores the best accuracy as a tensor."""
    best = tensor(np.array(0.5, np.float32), "best")
    SAVES[save](tmp_path / "m.pth", {"epoch": 3, "state_dict": state_dict(TENSORS), "best_acc1": best})
    same(read(tmp_path / "m.pth"), TENSORS)


def test_options_of_the_training_run_are_left_alone(tmp_path):
    """BEiT3 and timm store their argparse options beside the model."""
    best = Call("numpy.core.multiarray", "scalar", Call("numpy", "dtype", "f8", False, True), "bytes")
    save_zip(tmp_path / "m.pth", {"args": Call("argparse", "Namespace"), "best": best, "model": state_dict(TENSORS)})
    same(read(tmp_path / "m.pth"), TENSORS)


def attack(module, name, *arguments):
    call = Call(module, name, *arguments)
    weight = tensor(TENSORS["weight"])
    nested = Call("torch._utils", "_rebuild_tensor_v2", call, 0, (1,), (1,), False, None)
    in_shape = Call("torch._utils", "_rebuild_tensor_v2", Storage("0", TENSORS["weight"]), 0, call, (1,), False, None)
    parameter = Call("torch._utils", "_rebuild_parameter", weight, False, call)
    return {
        "alone": call,
        "a value": {"weight": weight, "x": call},
        "a key": {call: weight},
        "below model": {"model": {"weight": weight}, "optimizer": [call]},
        "the storage": {"weight": nested},
        "the shape": {"weight": in_shape},
        "a parameter": {"weight": parameter},
        "an OrderedDict": {"weight": weight, "x": Call("collections", "OrderedDict", call)},
    }


FUNCTIONS = {
    "os.system": ("os", "system", "touch {}"),
    "posix.system": ("posix", "system", "touch {}"),
    "builtins.eval": ("builtins", "eval", "open('{}', 'w')"),
    "builtins.getattr": ("builtins", "getattr", "x", "__class__"),
    "subprocess.Popen": ("subprocess", "Popen", ["touch", "{}"]),
    "torch.load": ("torch", "load", "{}"),
    "torch.hub.load": ("torch.hub", "load", "{}"),
    "functools.partial": ("functools", "partial", "{}"),
    "torch._utils._rebuild_tensor_v2.__globals__": ("torch._utils", "_rebuild_tensor_v2.__globals__", "{}"),
}


@pytest.mark.parametrize("where", attack("os", "system"))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_code_is_refused_and_not_run(where, function, tmp_path):
    module, name, *arguments = FUNCTIONS[function]
    marker = tmp_path / "executed"
    arguments = [a.format(marker) if isinstance(a, str) else a for a in arguments]
    arguments = [[x.format(marker) for x in a] if isinstance(a, list) else a for a in arguments]
    value = attack(module, name, *arguments)[where]
    for save in (save_zip, save_legacy) if where != "a key" else (save_zip,):
        file = tmp_path / "model.pth"
        save(file, value)
        with pytest.raises(ConversionError, match=r"model\.pth: the pickle holds code: it asks for") as caught:
            open_tensors(file)
        assert f"{module}.{name}." in str(caught.value)
        assert not marker.exists()


def raw(tmp_path, program: bytes):
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("m/data.pkl", program)
    return tmp_path / "m.pth"


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cos\nsystem\n(S'touch x'\ntR.",
        b"(S'touch x'\nios\nsystem\n.",  # INST
        b"\x80\x02(cos\nsystem\nS'touch x'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x07touch x\x85R.",  # STACK_GLOBAL
        b"\x80\x02cos\nsystem\n)\x81.",  # NEWOBJ
    ],
)
def test_every_way_to_name_a_function(program, tmp_path):
    with pytest.raises(ConversionError, match=r"holds code: it asks for os\.system"):
        open_tensors(raw(tmp_path, program))


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n}S'_call'\nK\x01sb.",  # BUILD on a function
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}S'_call'\nK\x01s\x86b.",  # with slots
        b"\x80\x02cargparse\nNamespace\n}S'append'\nK\x01sb.",  # BUILD on a class
        b"\x80\x02\x82\x01.",  # a function by its number in the registry of extensions
    ],
)
def test_what_would_change_the_reader_is_refused(program, tmp_path):
    with pytest.raises(ConversionError, match=r"m\.pth: is no torch pickle"):
        open_tensors(raw(tmp_path, program))
    save_zip(tmp_path / "good.pth", state_dict(TENSORS))
    same(read(tmp_path / "good.pth"), TENSORS)


STORAGE = Storage("0", np.arange(6, dtype=np.float32))


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": (7,)},
        {"shape": (3,), "offset": 4},
        {"shape": (2, 2), "strides": (5, 1)},
        {"shape": (2,), "strides": (-1,)},
        {"shape": (-2,)},
        {"shape": (2,), "offset": -1},
        {"shape": (2, 2), "strides": (1,)},
        {"shape": ("a",)},
    ],
)
def test_tensors_that_reach_beyond_their_storage(fields, tmp_path):
    strides = fields.pop("strides", (1,) * len(fields["shape"]))
    save_zip(tmp_path / "m.pth", {"w": tensor(STORAGE.array, storage=STORAGE, strides=strides, **fields)})
    with pytest.raises(ConversionError, match=r"m\.pth: .*damaged"):
        open_tensors(tmp_path / "m.pth")


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("cut", [0, 1, 3, 60, -40, -1])
def test_truncated_files(save, cut, tmp_path):
    file = tmp_path / "m.pth"
    SAVES[save](file, state_dict({"w": np.arange(100, dtype=np.float32)}))
    data = file.read_bytes()
    file.write_bytes(data[:cut])
    with pytest.raises(ConversionError, match=r"m\.pth: "):
        read(file)


def test_a_file_that_has_become_shorter_since_it_was_opened(tmp_path):
    file = tmp_path / "m.pth"
    save_legacy(file, state_dict({"w": np.arange(100, dtype=np.float32)}))
    tensors = open_tensors(file).tensors
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ConversionError, match=r"m\.pth: cannot be read"):
        np.asarray(tensors["w"])


def test_what_is_no_state_dict(tmp_path):
    save_zip(tmp_path / "m.pth", {"epoch": 3})
    with pytest.raises(ConversionError, match="no state dict"):
        open_tensors(tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "n.pth", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(ConversionError, match=r"holds no data\.pkl"):
        open_tensors(tmp_path / "n.pth")
    with zipfile.ZipFile(tmp_path / "s.pth", "w") as archive:
        archive.writestr("s/data.pkl", b"N.")
        archive.writestr("s/constants.pkl", b"N.")
    with pytest.raises(ConversionError, match="TorchScript"):
        open_tensors(tmp_path / "s.pth")


@pytest.mark.peers
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_itself_writes(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base, "column": base[:, 1], "transposed": base.T, "half": base.bfloat16(), "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)), "empty": torch.zeros(0, 2), "bool": base > 3,
        "complex": torch.tensor([1j]), "double": base.double(), "float16": base.half(), "byte": base.byte(),
    }  # fmt: skip
    if zipped:
        tensors["float8"] = base.to(torch.float8_e4m3fn)
        tensors["uint16"] = torch.tensor([1, 2], dtype=torch.uint16)
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "m.bin")
    assert found.keys() == tensors.keys()
    for name, want in tensors.items():
        data = want.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if want.numel() else b""
        assert found[name].tobytes() == data, name
        assert found[name].shape == tuple(want.shape)
        assert str(found[name].dtype) == str(want.dtype).removeprefix("torch.")
