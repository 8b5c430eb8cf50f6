"""What an entry of the registry says, and the parameters that several methods share."""

from typing import Any, NamedTuple

from tadrop_jax.errors import ParameterError, meant


class Parameter(NamedTuple):
    """A parameter of a method.

    Attributes:
      name: as in Python and in ``--set NAME=VALUE``.
      kind: ``"number"``, ``"numbers"`` (one, or one per task), ``"whole"``, ``"flag"``, ``"choice"``, ``"patterns"``,
        ``"order"`` (a list of task indices), ``"sparsifier"`` or ``"rule"`` (another method, in text as
        ``NAME[:PARAMETER=VALUE;...]``), ``"text"``, or ``"object"`` (trees, data and functions, which only Python can
        give).
      default: what it is if nothing is said.
      about: one line for the user.
      options: of a choice.
      optional: whether None is a value.
      range: the least and the largest number, both allowed; None where there is no bound. Bounds that hang on other
        parameters (n of n:m is at most m) are not told.
    """

    name: str
    kind: str
    default: Any
    about: str
    options: tuple[Any, ...] = ()
    optional: bool = False
    range: tuple[float | None, float | None] = (None, None)

    def bounds(self) -> str:
        """The range in words; empty if there is none."""
        low, high = self.range
        if low is not None and high is not None:
            return f"{low:g} to {high:g}"
        return f"at least {low:g}" if low is not None else "" if high is None else f"at most {high:g}"


class Method(NamedTuple):
    """A sparsifier or a merge rule.

    Attributes:
      name: its name everywhere.
      role: ``"sparsifier"`` or ``"rule"``.
      home: module and function.
      about: one line for the user.
      source: where it comes from.
      granularity: ``"entry"``, ``"group"``, ``"tensor"``, ``"global"``, or several.
      output: ``"task vectors"``, ``"one model"`` or ``"one model per task"``.
      parameters: in the order of the function.
      random: whether it draws random numbers.
      on: what it works on, ``"task vectors"``, ``"weights"`` or ``"LoRA pairs"``.
      models: the least and the most fine-tuned models it takes; None means any number.
      needs_data: whether it needs data and a model's function, so that it runs from Python only.
      properties: what the property tests hold it to, at the defaults and at each option of its choices.
        ``"symmetric"``: the order of the tasks does not matter. ``"scales"``: task vectors times a power of two give
        the result times it. ``"zero"``: zero task vectors give zero. ``"density"``: density 0 gives zeros, density 1
        is the identity (of a rule: the rule without its trim). ``"gradients"``: gradients in coefficients, weights and
        task vectors are finite. At the defaults only: ``"local"``: another tensor in the tree changes nothing.
        ``"copies"``: T copies of one model give what one gives.
    """

    name: str
    role: str
    home: str
    about: str
    source: str
    granularity: str
    output: str
    parameters: tuple[Parameter, ...]
    random: bool = False
    on: str = "task vectors"
    models: tuple[int, int | None] = (1, None)
    needs_data: bool = False
    properties: frozenset[str] = frozenset()

    @property
    def from_python(self) -> str:
        """Why only Python can call it; empty if the command line and recipes can too."""
        if self.needs_data:
            return "needs data and the model's function"
        return "merges LoRA pairs" if self.on == "LoRA pairs" else ""

    def parameter(self, name: str) -> Parameter:
        """One parameter.

        Raises:
          ParameterError: naming the method and what parameters it has.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        names = [p.name for p in self.parameters]
        raise ParameterError(
            f"{self.name} has no parameter {name!r}{meant(name, names)}; it has {', '.join(names) or 'none'}"
        )


KEEP = ("at_least_one", "floor", "floor_plus_one", "exact", "exact_at_least_one")
NORM = Parameter("norm", "choice", 2, "norm to restore after pruning: 2, 1 or none", (1, 2), optional=True)
WEIGHTS = Parameter("weights", "numbers", 1.0, "weight of each task")
MULTI_TASK = Parameter(
    "multi_task",
    "rule",
    None,
    "rule whose vector takes the place of the sum, e.g. ties:density=.2;combine=sum",
    optional=True,
)
TALL_LAMBDA = Parameter(
    "tall_lambda", "numbers", 0.4, "threshold of the TALL masks; one number, or one per task", range=(0, None)
)
NORMALIZE = Parameter("normalize", "flag", False, "divide by the sum of the weights")
COEFFICIENT = Parameter("coefficient", "number", 1.0, "multiplies the merged vector")
THRESHOLD = Parameter("threshold", "number", 1e-5, "a change above it counts", range=(0, None))
SMOOTH = frozenset({"symmetric", "scales", "zero", "gradients"})
