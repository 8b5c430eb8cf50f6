"""Merge rules that treat matrices as matrices: by their singular values, or by least squares."""

from tadrop_jax.registry.schema import Method

ENTRIES: tuple[Method, ...] = ()
