"""Small models to merge with the code of others, and their arrays as tensors of PyTorch."""

import ml_dtypes
import numpy as np

Tree = dict[str, np.ndarray]
BFLOAT16 = ml_dtypes.bfloat16
# A matrix, a scalar, a vector, and a kernel of four axes in either dtype: each shape and dtype compiles anew.
TENSORS = {
    "block/kernel": np.float32,
    "scale": np.float32,
    "conv/kernel": np.float32,
    "block/bias": BFLOAT16,
    "conv/half": BFLOAT16,
}


def family(make_stacks, kind: str, tasks: int, without=()) -> tuple[Tree, list[Tree]]:
    """A base and T models; of kind "exact" with ties, zeros of both signs, a zero task vector and opposite entries.

    All values of that kind are exact in bfloat16, so that no rounding hides a difference.
    """
    stacks = make_stacks(kind, tasks)
    stacks["conv/half"] = make_stacks(kind, tasks, seed=1)["conv/kernel"]
    rng = np.random.default_rng(tasks)
    base: Tree = {}
    models: list[Tree] = [{} for _ in range(tasks)]
    for name, dtype in TENSORS.items():
        if name in without:
            continue
        start = (rng.integers(-64, 65, stacks[name].shape[1:]) / 64).astype(dtype)
        start = np.where(rng.random(start.shape) < 0.1, np.asarray(-0.0, dtype), start)
        base[name] = start
        for model, x in zip(models, stacks[name], strict=True):
            model[name] = np.asarray(start.astype(np.float32) + x).astype(dtype)
    return base, models


def tensor(x, dtype=None):
    """An array as a tensor: of its own dtype, or of one that NumPy knows."""
    import torch

    x = np.array(x, dtype)  # a copy: torch warns of arrays that cannot be written to
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == BFLOAT16 else torch.from_numpy(x)


def array(x) -> np.ndarray:
    """A tensor as a float32 array."""
    return x.detach().float().numpy()


def assert_same(ours: Tree, theirs: Tree, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    """Equal in float32 up to rounding; of bfloat16 tensors what the others make in float32, rounded, to one unit."""
    assert theirs.keys() <= ours.keys()
    for name, expected in theirs.items():
        actual = np.asarray(ours[name])
        assert actual.shape == expected.shape, name
        close = (rtol, atol)
        if actual.dtype == BFLOAT16:
            expected = expected.astype(BFLOAT16).astype(np.float32)
            close = (2.0**-7, max(atol, 1e-6))
        np.testing.assert_allclose(actual.astype(np.float32), expected, *close, err_msg=name)
