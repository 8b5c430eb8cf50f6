"""Merge rules on weights rather than task vectors."""

from tadrop_jax.registry.schema import Method

ENTRIES: tuple[Method, ...] = ()
