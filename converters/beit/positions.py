"""Relative positions of patches and of the class token."""

import numpy as np


def relative_position_index(height: int, width: int) -> np.ndarray:
    """Numbers the relative positions: which row of a table belongs to a pair of tokens.

    Args:
        height: patches along the height.
        width: patches along the width.

    Returns:
        `(1 + patches, 1 + patches)`, int64: the class token stands first, and the last three rows of the table are for
        it: as the one that looks, as the one that is looked at, and both.

    Example:
        >>> relative_position_index(1, 2)
        array([[5, 3, 3],
               [4, 1, 0],
               [4, 2, 1]])
    """
    rows, columns = (axis.reshape(-1) for axis in np.meshgrid(np.arange(height), np.arange(width), indexing="ij"))
    down, right = rows[:, None] - rows + height - 1, columns[:, None] - columns + width - 1
    distances = (2 * height - 1) * (2 * width - 1)
    index = np.empty((1 + height * width,) * 2, np.int64)
    index[1:, 1:] = down * (2 * width - 1) + right
    index[0, :], index[:, 0], index[0, 0] = distances, distances + 1, distances + 2
    return index
