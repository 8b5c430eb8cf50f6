"""Activation functions by the names that Hugging Face's configurations give them. This needs jax."""

from functools import partial

import jax

_TANH_GELU = partial(jax.nn.gelu, approximate=True)
_ERF_GELU = partial(jax.nn.gelu, approximate=False)

ACTIVATIONS = {
    "gelu": _ERF_GELU,
    "gelu_python": _ERF_GELU,
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}
