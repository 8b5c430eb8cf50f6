"""Extension of griffe: our docstrings, which read well in Python's `help`, as Markdown for the reference page."""

import re

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")
_MATH = re.compile(r"^( *)\.\. math::\n\n((?:\1 +\S.*\n|\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Examples as code, formulas as they are written, names without roles."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = _ROLE.sub(lambda match: f"`{match[1].rsplit('.', 1)[-1]}`", text).replace(":math:`", "`")
        obj.docstring.value = _MATH.sub(
            lambda match: f"{match[1]}```latex\n{match[2].rstrip()}\n{match[1]}```\n\n", text
        )
