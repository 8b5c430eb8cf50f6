"""The table machinery: both directions, byte for byte, and every fault named."""

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from converters import ConversionError, Row, Transform, layout, to_flax, to_torch
from converters.mapping import conv, flatten, linear, norm

TABLE = (
    Row("model.emb.weight", "emb/embedding"),
    *conv("model.stem", "stem"),
    *linear("model.h.{i}.{p:query|key}", "h/{i}/{p:query|key}"),
    *norm("model.h.{i}.ln", "h/{i}/ln"),
)


def tensors(dtype=np.float32, layers=2):
    rng = np.random.default_rng(0)
    shapes = {"model.emb.weight": (5, 4), "model.stem.weight": (4, 3, 2, 5), "model.stem.bias": (4,)}
    for i in range(layers):
        for p in ("query", "key"):
            shapes |= {f"model.h.{i}.{p}.weight": (6, 4), f"model.h.{i}.{p}.bias": (6,)}
        shapes |= {f"model.h.{i}.ln.weight": (4,), f"model.h.{i}.ln.bias": (4,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_there_and_back_gives_the_same_bytes(dtype):
    source = tensors(dtype)
    back = to_torch(to_flax(source, TABLE), TABLE)
    assert back.keys() == source.keys()
    for name, want in source.items():
        assert back[name].dtype == want.dtype
        assert back[name].shape == want.shape
        assert back[name].tobytes() == want.tobytes(), name


def test_a_scalar_stays_one():
    table = (Row("logit_scale", "logit_scale"),)
    assert to_torch(to_flax({"logit_scale": np.float32(3)}, table), table)["logit_scale"].shape == ()


def test_kernels_have_the_layout_of_flax():
    source = tensors()
    tree = to_flax(source, TABLE)
    np.testing.assert_array_equal(tree["h"][1]["key"]["kernel"], source["model.h.1.key.weight"].T)
    kernel = tree["stem"]["kernel"]  # OIHW (4, 3, 2, 5) -> HWIO
    assert kernel.shape == (2, 5, 3, 4)
    assert kernel[1, 4, 2, 3] == source["model.stem.weight"][3, 2, 1, 4]
    assert "key" in tree["h"][0]
    assert "0" not in tree["h"]


def test_every_fault_is_named_at_once():
    expect = to_flax(tensors(), TABLE)
    broken = tensors()
    del broken["model.h.0.query.weight"]
    broken["model.h.1.ln.weight"] = np.zeros(9, np.float32)
    broken["model.extra"] = np.zeros((2, 3), np.float32)
    broken["model.h.1.key.weight"] = np.zeros((2, 3, 4), np.float32)
    broken["model.h.7.ln.bias"] = np.zeros(4, np.float32)
    with pytest.raises(ConversionError) as caught:
        to_flax(broken, TABLE, expect=expect)
    for name in ("h.0.query.weight", "h.1.ln.weight", "model.extra", "h.1.key.weight", "h.7.ln.bias"):
        assert any(name in line for line in caught.value.problems), name
        assert name in str(caught.value)
    assert "(9,)" in str(caught.value)
    assert "(4,)" in str(caught.value)


def test_of_many_faults_of_a_kind_the_first_few_are_told():
    expect = to_flax(tensors(), TABLE)
    with pytest.raises(ConversionError) as caught:
        to_flax({f"other.{i}": np.zeros(2) for i in range(40)}, TABLE, expect=expect)
    lines = str(caught.value).splitlines()
    assert len(caught.value.problems) == 40 + len(tensors())
    assert lines[1:7] == [*(f"  unmapped: other.{i} (2,)" for i in range(5)), "  unmapped: and 35 more"]
    assert lines[7].startswith("  missing: model.")
    assert lines[12:] == [f"  missing: and {len(tensors()) - 5} more"]


def test_to_torch_names_unmapped_missing_and_misshapen_parameters():
    tree = to_flax(tensors(), TABLE)
    tree["head"] = {"kernel": np.zeros((2, 2))}
    with pytest.raises(ConversionError, match="unmapped: head/kernel"):
        to_torch(tree, TABLE)
    expect = to_flax(tensors(), TABLE)
    del tree["head"], tree["emb"]
    tree["stem"]["bias"] = np.zeros(3)
    with pytest.raises(
        ConversionError,
        match=r"(?s)missing: model.emb.weight.*wrong shape: stem/bias|"
        r"wrong shape: stem/bias.*missing: model.emb.weight",
    ):
        to_torch(tree, TABLE, expect=expect)


def test_two_rows_for_one_target_are_refused():
    table = (Row("a", "x"), Row("b", "x"))
    with pytest.raises(ConversionError, match="mapped twice: b and a"):
        to_flax({"a": np.zeros(1), "b": np.zeros(1)}, table)


def test_layout_is_the_way_back_to_pytorch():
    place = layout(TABLE)
    source = tensors()
    for path, leaf in flatten(to_flax(source, TABLE)).items():
        name, axes = place(path)
        torch = leaf if axes is None else leaf.transpose(axes)
        np.testing.assert_array_equal(torch, source[name], err_msg=path)
    assert place("no/such/path") is None


def test_modules_states_and_dictionaries_have_the_same_names():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.h = nnx.List([nnx.Linear(2, 3, rngs=rngs)])

    model = Model(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    want = {"h/0/kernel", "h/0/bias"}
    pure = nnx.to_pure_dict(state)
    for tree in (model, state, pure, {"params": pure}):
        assert flatten(tree).keys() == want
    torch = to_torch(model, linear("h.{i}", "h/{i}"))
    np.testing.assert_array_equal(torch["h.0.weight"], np.asarray(model.h[0].kernel[...]).T)


def test_transforms_undo_themselves():
    for transform in Transform:
        forward, back = transform.axes(forward=True), transform.axes(forward=False)
        x = np.arange(np.prod(range(1, len(forward) + 1), dtype=int)).reshape(range(1, len(forward) + 1))
        np.testing.assert_array_equal(x.transpose(forward or None).transpose(back or None), x)


FUSED = (Row("attn.in_proj_weight", ("q/kernel", "k/kernel", "v/kernel"), Transform.LINEAR),)


def test_fused_tensors_are_cut_and_joined():
    fused = np.arange(24, dtype=np.float32).reshape(6, 4)
    tree = to_flax({"attn.in_proj_weight": fused}, FUSED)
    np.testing.assert_array_equal(tree["k"]["kernel"], fused[2:4].T)
    np.testing.assert_array_equal(to_torch(tree, FUSED)["attn.in_proj_weight"], fused)
    assert layout(FUSED)("k/kernel") == ("k/kernel", (1, 0))


def test_what_is_wrong_with_a_fused_tensor_is_named():
    with pytest.raises(ConversionError, match=r"in_proj_weight \(7, 4\).*3 equal parts"):
        to_flax({"attn.in_proj_weight": np.zeros((7, 4))}, FUSED)
    kernels = {name: {"kernel": np.zeros((4, 2), np.float32)} for name in "qkv"}
    expect = {name: dict(kernel) for name, kernel in kernels.items()}
    del kernels["k"]
    with pytest.raises(ConversionError, match=r"1 of the 3 parts of attn.in_proj_weight") as caught:
        to_torch(kernels, FUSED, expect=expect)
    assert any("missing: attn.in_proj_weight (Flax k/kernel)" in line for line in caught.value.problems)
    kernels["k"] = {"kernel": np.zeros((4, 3), np.float32)}
    with pytest.raises(ConversionError, match="are not alike"):
        to_torch(kernels, FUSED)
