"""Merge rules: last steps that turn a stack of task vectors into one model, or one model per task."""
