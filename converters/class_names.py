"""The names of classes in a `config.json`, as transformers keeps them."""

from collections.abc import Sequence
from typing import Any

_MOST = 1 << 24  # classes: names of more would take minutes to make


def taken(fields: dict[str, Any]) -> tuple[str, ...]:
    """Takes the names of the classes out of a configuration's fields: LABEL_0, ... if only their number is there, or 2.

    Args:
        fields: the contents of a `config.json`; what tells of classes leaves it.

    Raises:
        ValueError: no model has so many.
    """
    names, count = fields.pop("id2label", None), fields.pop("num_labels", 2)
    fields.pop("label2id", None)
    if names is None:
        numbers = range(count)
        if numbers.stop > _MOST:
            raise ValueError(f"num_labels is {count}")
        names = {str(i): f"LABEL_{i}" for i in numbers}
    return tuple(names[key] for key in sorted(names, key=int))


def told(labels: Sequence[str]) -> dict[str, Any]:
    """The fields that tell of the classes of these names."""
    numbered = list(enumerate(labels))
    return {"id2label": {str(i): label for i, label in numbered}, "label2id": {label: i for i, label in numbered}}
