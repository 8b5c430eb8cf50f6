"""Position embeddings of BEiT3 for another image size, as its authors' code resizes them when it loads a checkpoint."""

import numpy as np

# The rows before the patches': two that fairseq leaves unused, and the class token's.
_BEFORE = 3


def resize_positions(embedding: np.ndarray, patches: int) -> np.ndarray:
    """Resizes the image's position embeddings to another number of patches, bicubic.

    Args:
        embedding: `(3 + p, width)`, the tensor `encoder.embed_positions.A.weight`, p the square of a side.
        patches: how many patches the resized embedding is for, the square of a side.

    Returns:
        `(3 + patches, width)` in the embedding's dtype, computed in float32 (microsoft/unilm,
        `beit3/utils.py: load_model_and_may_interpolate`: torch's bicubic without `align_corners`).

    Raises:
        ValueError: a number of patches is no square.

    Example:
        >>> resize_positions(np.ones((3 + 4, 5), np.float32), 9).shape
        (12, 5)
    """
    old, new = round((len(embedding) - _BEFORE) ** 0.5), round(patches**0.5)
    if old * old != len(embedding) - _BEFORE or new * new != patches:
        raise ValueError(f"{len(embedding) - _BEFORE} or {patches} patches are no square")
    if old == new:
        return embedding
    weights = _weights(old, new)
    grid = embedding[_BEFORE:].astype(np.float32).reshape(old, old, -1)
    resized = np.einsum("yi,xj,ijc->yxc", weights, weights, grid).reshape(patches, -1)
    return np.concatenate([embedding[:_BEFORE], resized.astype(embedding.dtype)])


def _weights(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """`(new, old)`: what each old place gives to a new one; a is torch's coefficient of the cubic."""
    weights = np.zeros((new, old))
    for row, at in enumerate((np.arange(new) + 0.5) * old / new - 0.5):
        for place in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d = abs(at - place)
            near = ((a + 2) * d - (a + 3)) * d * d + 1
            far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            weights[row, min(max(place, 0), old - 1)] += near if d <= 1 else far
    return weights.astype(np.float32)
