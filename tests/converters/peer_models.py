"""Models of images of transformers and timm for tests: random ones, their outputs, their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import converters


def perturbed(make: Any, dtype: str = "float32") -> Any:
    """A model with random weights everywhere: biases and scales start at 0 and 1, where a mix-up would not show."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


def forward(model: Any, images: np.ndarray, **inputs: np.ndarray) -> list[np.ndarray]:
    """What a model gives for images (batch, height, width, channels): tensors, or those of transformers' outputs."""
    import torch

    dtype = next(model.parameters()).dtype
    pixels = torch.tensor(images.transpose(0, 3, 1, 2)).to(dtype)
    with torch.no_grad():
        out = model(pixels, **{name: torch.tensor(array) for name, array in inputs.items()})
    if isinstance(out, torch.Tensor):
        return [out.float().numpy()]
    names = ("logits",) if hasattr(out, "logits") else ("last_hidden_state", "pooler_output")
    return [getattr(out, name).float().numpy() for name in names if getattr(out, name) is not None]


def save_peer(model: Any, folder: Path, new_names: bool = False) -> None:
    """Writes a model of transformers; with `new_names` those of its `state_dict()`."""
    model.save_pretrained(folder)
    if new_names:
        tensors = {name: tensor.contiguous().numpy() for name, tensor in model.state_dict().items()}
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    """Writes tensors, and a `config.json` if one is given."""
    folder.mkdir(parents=True)
    safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_bytes(ours: Any, theirs: Any) -> None:
    """Names, shapes, dtypes and bytes of two checkpoints, or tensors by name."""
    one, other = (x if isinstance(x, dict) else converters.read_tensors(x) for x in (ours, theirs))
    assert one.keys() == other.keys()
    for name, array in other.items():
        assert (one[name].dtype, one[name].shape) == (array.dtype, array.shape), name
        assert one[name].tobytes() == array.tobytes(), name
