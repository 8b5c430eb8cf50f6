"""Extension of griffe: our docstrings, which read well in Python's `help`, as Markdown for the reference page."""

import re

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")
# The formula begins behind the directive, or after an empty line.
_MATH = re.compile(r"^( *)\.\. math::(?: |\n\n)(.*\S(?:\n+\1 +\S.*)*)\n*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Examples as code, formulas as they are written, names without roles."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = _ROLE.sub(lambda match: f"`{match[1].rsplit('.', 1)[-1]}`", text).replace(":math:`", "`")
        obj.docstring.value = _MATH.sub(_block, text)


def _block(match: re.Match[str]) -> str:
    lines = ["```latex", *(line.strip() for line in match[2].splitlines()), "```", "", ""]
    return "\n".join(f"{match[1]}{line}" if line else "" for line in lines)
