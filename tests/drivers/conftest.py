"""Small models that the drivers merge: a base, fine-tunes, and batches of each task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

WIDTH, HIDDEN, CLASSES, TASKS = 4, 5, 3, 2


def mlp(params, x):
    """Two layers; the trees of the tests below are its parameters."""
    hidden = jnp.tanh(x @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"] + params["two"]["bias"]


@pytest.fixture(scope="session")
def trees():
    """A base with an integer leaf, and two fine-tunes."""
    rng = np.random.default_rng(0)

    def tree(scale, around=None):
        shapes = {"one": (WIDTH, HIDDEN), "two": (HIDDEN, CLASSES)}
        made = {n: {"kernel": rng.normal(size=s), "bias": rng.normal(size=s[1:])} for n, s in shapes.items()}
        made = jax.tree.map(lambda v: jnp.asarray(scale * v, jnp.float32), made)
        return made if around is None else jax.tree.map(jnp.add, around, made)

    base = tree(0.5)
    step = {"step": jnp.int32(7)}
    return base | step, [tree(0.4, base) | step for _ in range(TASKS)]


@pytest.fixture(scope="session")
def inputs():
    """For each task a list of two batches."""
    rng = np.random.default_rng(1)
    return [[(rng.normal(size=(6, WIDTH)) * scale).astype(np.float32) for _ in range(2)] for scale in (1.0, 0.5)]
