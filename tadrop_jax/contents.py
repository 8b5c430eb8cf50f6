"""What parameters hold: no NaN and no infinity, and no model that is the base."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from tadrop_jax.errors import ContentError, MergeWarning
from tadrop_jax.placement import together
from tadrop_jax.trees import is_traced


def check_contents(rows, alone: str = "the stack") -> None:
    """Refuses NaN and infinity, and warns of a model that equals the base; concrete inputs only.

    Args:
      rows: name, base or None, and what is compared with it, of each tensor.
      alone: what it is called where there is no base.

    Raises:
      ContentError: naming the tensor and the model.
    """
    leaves = [leaf for _, base, column in rows for leaf in (base, *column) if leaf is not None]
    if is_traced(leaves):
        return
    # Concrete tensors inside a user's jit are checked all the same; of what float32 cannot hold we speak ourselves.
    with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):
        found = jax.device_get([_contents(base, together(base, column)) for _, base, column in rows])
    for (name, base, column), (finite, _) in zip(rows, found, strict=True):
        who = (["the base"] if base is not None else []) + [f"model {t}" for t in range(len(column))]
        if base is None:
            who = [alone]
        values = (*([base] if base is not None else []), *column)
        for ok, one, leaf in zip(finite, who, values, strict=True):
            if not ok:
                seen = getattr(leaf, "is_fully_addressable", True)
                wide = seen and np.all(np.isfinite(leaf))  # float64
                what = "values beyond the range of float32" if wide else "NaN or infinity"
                raise ContentError(f"tensor {name!r} holds {what} in {one}")
    if rows and rows[0][1] is not None:
        for t in range(len(rows[0][2])):
            if not any(differs[t] for _, differs in found):
                warnings.warn(f"model {t} equals the base: its task vector is zero", MergeWarning, stacklevel=3)


@jax.jit
def _contents(base, models):
    """Which of base and models hold NaN or infinity (in float32), and which models differ from the base."""
    leaves = (() if base is None else (base,)) + tuple(models)
    finite = [jnp.all(jnp.isfinite(jnp.asarray(a, jnp.float32))) for a in leaves]
    return finite, [] if base is None else [jnp.any(m != base) for m in models]
