"""Functions of (params, batch) out of Flax modules: the model's output, and the inputs of its linear layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tadrop_jax.trees import named_leaves

_INPUTS = "kernel_inputs"


def nnx_apply(module) -> tuple[Callable, Any]:
    """A pure function of an nnx module, and its parameters.

    What is not ``nnx.Param`` (batch statistics, random streams) is kept as it is; what the module writes to it is lost.

    Args:
      module: an ``nnx.Module``; put it into evaluation mode first.

    Returns:
      ``apply(params, batch)``, and the parameters: an ``nnx.State``, which may serve as base of a merge.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> from flax import nnx
      >>> apply, params = tj.nnx_apply(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> apply(params, jnp.ones((4, 2))).shape
      (4, 3)
    """
    from flax import nnx

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return lambda params, batch: nnx.merge(graph, params, rest, copy=True)(batch), params


def nnx_inputs(module) -> Callable:
    """For RegMean: a function that gives the inputs of an nnx module's ``Linear`` and ``LinearGeneral`` layers.

    Args:
      module: an ``nnx.Module``; put it into evaluation mode first.

    Returns:
      ``capture(params, batch) -> {name of a kernel: inputs (..., in)}``, a list of them for a layer that runs several
      times. Layers inside nnx transformations (``nnx.scan``, ``nnx.remat``) cannot be seen.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu)
      >>> capture, (_, params) = tj.nnx_inputs(model), tj.nnx_apply(model)
      >>> {name: [x.shape for x in inputs] for name, inputs in capture(params, jnp.ones((4, 2))).items()}
      {'layers/0/kernel': [(4, 2)]}
    """
    from flax import nnx

    graph, _, rest = nnx.split(module, nnx.Param, ...)

    def capture(params, batch):
        found: dict[str, list] = {}
        # A copy of its own for this call: its layers can be given a class that takes notes.
        copy = nnx.merge(graph, params, rest, copy=True)
        for path, layer in nnx.iter_modules(copy):
            if isinstance(layer, (nnx.Linear, nnx.LinearGeneral)):
                name = "/".join((*map(str, path), "kernel"))
                object.__setattr__(layer, "__class__", _noting(type(layer), name, found))
        copy(batch)
        return found

    return capture


def _noting(kind: type, name: str, found: dict[str, list]) -> type:
    def call(self, inputs, *args, **kwargs):
        if not getattr(self, "batch_axis", None):
            found.setdefault(name, []).append(_contracted(inputs, getattr(self, "axis", -1)))
        return kind.__call__(self, inputs, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def linen_inputs(module, **arguments) -> Callable:
    """For RegMean: a function that gives the inputs of a Linen module's ``Dense`` and ``DenseGeneral`` layers.

    Args:
      module: a ``flax.linen.Module``.
      **arguments: of ``module.apply``, such as ``train=False``.

    Returns:
      ``capture(params, batch) -> {name of a kernel: inputs (..., in)}``, a list of them for a layer that runs several
      times. ``params`` are the parameters, or all variables (``{"params": ...}``). Layers inside ``nn.scan`` are left
      out unless it carries the collection ``kernel_inputs``.

    Example:
      >>> import jax, jax.numpy as jnp, tadrop_jax as tj
      >>> from flax import linen as nn
      >>> model, x = nn.Sequential([nn.Dense(3), nn.relu]), jnp.ones((4, 2))
      >>> inputs = tj.linen_inputs(model)(model.init(jax.random.key(0), x), x)
      >>> {name: [x.shape for x in found] for name, found in inputs.items()}
      {'layers_0/kernel': [(4, 2)]}
    """
    from flax import linen as nn

    def note(call, args, kwargs, context):
        layer = context.module
        dense = isinstance(layer, nn.Dense) or (isinstance(layer, nn.DenseGeneral) and not layer.batch_dims)
        if dense and context.method_name == "__call__":
            inputs = args[0] if args else kwargs["inputs"]
            layer.sow(_INPUTS, "kernel", _contracted(inputs, getattr(layer, "axis", -1)))
        return call(*args, **kwargs)

    def capture(params, batch):
        variables = params if "params" in params else {"params": params}
        with nn.intercept_methods(note):
            _, state = module.apply(variables, batch, mutable=[_INPUTS], **arguments)
        names, leaves, _ = named_leaves(dict(state.get(_INPUTS, {})))
        found: dict[str, list] = {}
        for name, leaf in zip(names, leaves, strict=True):
            found.setdefault(name.rpartition("/")[0], []).append(leaf)  # the last part counts the calls
        return found

    return capture


def _contracted(inputs: jax.Array, axes) -> jax.Array:
    """Inputs as ``(..., in)``, where the layer contracts these axes."""
    # The axes of a kernel lie as those of the inputs do, in whatever order the layer names them.
    axes = tuple(sorted(a % inputs.ndim for a in (axes if isinstance(axes, (tuple, list)) else (axes,))))
    inputs = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
    return jnp.reshape(inputs, (*inputs.shape[: inputs.ndim - len(axes)], -1))
