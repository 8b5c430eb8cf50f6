"""Merging LoRA adapters: in bases that the tasks share, without ever forming T dense task vectors."""
