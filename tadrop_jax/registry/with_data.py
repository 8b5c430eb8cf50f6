"""Methods that need data and gradients: drivers on top of the steps."""

from tadrop_jax.registry.schema import Method

ENTRIES: tuple[Method, ...] = ()
