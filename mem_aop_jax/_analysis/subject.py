"""What is measured: a loss whose gradients are approximate by any rules."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from mem_aop_jax._approximate.approximated import Approximated, sites_of, with_rules
from mem_aop_jax._approximate.program import Site
from mem_aop_jax._approximate.settings import Settings
from mem_aop_jax._approximate.tracing import is_array, split_arrays
from mem_aop_jax._models import Rules
from mem_aop_jax._progress import say
from mem_aop_jax.linen import COLLECTION

ExampleInput = (  # of a model: arrays, shapes, other arguments, and trees of them
    ArrayLike | jax.ShapeDtypeStruct | Iterable["ExampleInput"] | Mapping[Any, "ExampleInput"]
)


class BackwardPass(NamedTuple):
    """The result of one backward pass.

    Attributes:
      gradient: of the loss, with respect to the parameters.
      memory: the next memory, or what the probes in its place measured.
      flops: as the compiler counts them; 0 where it does not.
    """

    gradient: chex.ArrayTree
    memory: dict[str, Any]
    flops: float


class Subject(NamedTuple):
    """A loss, and how it is called for a batch.

    Attributes:
      approx: `aop.approximate`'s, of the loss or of a pair of the loss and something else.
      is_model: whether it is a `ModelLoss`, of (params, batch, key); else the batch is a tuple of
        the arguments after the parameters.
    """

    approx: Approximated
    is_model: bool = False

    @classmethod
    def of_function(cls, caller: str, approx: object) -> "Subject":
        """Of what `aop.approximate` returns."""
        if not isinstance(approx, Approximated):
            raise TypeError(
                f"{caller}: got an object of type {type(approx).__name__}; it must be what "
                "aop.approximate returns for a loss, aop.approximate(loss, config), where "
                "loss(params, *batch) calls the model."
            )
        return cls(approx)

    @classmethod
    def of_model(cls, caller: str, model: nn.Module, loss: Callable, rules: Rules) -> "Subject":
        """Of a Linen model and a loss as in `aop.allocate`."""
        settings = Settings(caller, rules, None, None)
        return cls(Approximated(ModelLoss(model, loss), settings, type(model).__name__), True)

    def by(self, caller: str, rules: Rules) -> "Subject":
        """The same with other rules."""
        return self._replace(approx=with_rules(self.approx, caller, rules))

    def args(self, batch: Any, key: chex.PRNGKey) -> tuple:
        """The arguments of the function after the parameters."""
        return (batch, key) if self.is_model else batch

    def sites(self, params: chex.ArrayTree, batch: Any, key: chex.PRNGKey) -> list[Site]:
        """The sites that are approximate."""
        return sites_of(self.approx, params, *self.args(batch, key))

    def backward(
        self, params: chex.ArrayTree, memory: dict[str, Any], batch: Any, key: chex.PRNGKey
    ) -> BackwardPass:
        """One backward pass; what was compiled for it is kept."""
        return _backward_function(self.approx.fun)(self, params, memory, batch, key)


class ModelLoss:
    """`loss(model, variables, batch, key)` of a Linen model as a function of its parameters.

    It equals that of an equal model; one of a model with a list in a field, which has no hash,
    equals that of the same model.
    """

    def __init__(self, model: nn.Module, loss: Callable):
        self.model, self.loss = model, loss
        self._identity: tuple = model, loss
        try:
            self._hash = hash(self._identity)
        except TypeError:
            self._identity = id(model), loss
            self._hash = hash(self._identity)

    def __call__(self, params: chex.ArrayTree, batch: Any, key: chex.PRNGKey) -> Any:
        """The loss; the program of the model is approximate, not the model."""
        return self.loss(self.model, {"params": params, COLLECTION: {}}, batch, key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelLoss) and self._identity == other._identity


@functools.lru_cache(maxsize=8)  # a second measurement compiles nothing again
def _backward_function(fun: Callable) -> Callable[..., BackwardPass]:
    """`(subject, params, memory, batch, key) -> BackwardPass`, for subjects of this function."""

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(static: tuple, params: Any, memory: Any, arrays: Any, key: Any) -> tuple:
        subject, rest = static
        batch = rest.with_arrays(arrays)

        def loss(params: Any, memory: Any) -> chex.Array:
            return loss_of(subject.approx(params, memory, key, *subject.args(batch, key)))

        return jax.grad(loss, argnums=(0, 1), allow_int=True)(params, memory)

    flops: dict[tuple, float] = {}

    def backward(subject: Subject, params: Any, memory: Any, batch: Any, key: Any) -> BackwardPass:
        arrays, rest = split_arrays(batch)
        args = (subject, rest), params, memory, arrays, key
        leaves, structure = jax.tree.flatten(args[1:])
        kinds = tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves)
        signature = args[0], structure, kinds
        if signature not in flops:  # the call below uses what is compiled here
            say(f"{subject.approx.settings.caller}: compiling a backward pass")
            flops[signature] = counted_flops(gradients, *args)
        gradient, memory = gradients(*args)
        return BackwardPass(gradient, memory, flops[signature])

    return backward


def loss_of(result: Any) -> chex.Array:
    """The loss of what a function returns, which may be a pair of it and something else."""
    return result[0] if isinstance(result, tuple) else result


def check_batches(caller: str, subject: Subject, batches: Sequence[Any]) -> None:
    """Batches to measure on.

    Raises:
      TypeError: no list of them; a batch of a function that is no tuple of arguments.
      ValueError: fewer than two batches.
    """
    try:
        number = len(batches)
    except TypeError:
        raise TypeError(
            f"{caller}: batches are of type {type(batches).__name__}; they must be a list."
        ) from None
    if number < 2:
        raise ValueError(
            f"{caller}: got {number} batches; at least 2 are needed, since directions come "
            "from other batches than the rows."
        )
    for batch in batches:
        if not subject.is_model and not isinstance(batch, tuple):
            raise TypeError(
                f"{caller}: a batch is of type {type(batch).__name__}; it must be a tuple of the "
                "function's arguments after the parameters, as in approx(params, memory, key, "
                "*batch): for one argument (x,)."
            )


# ---- FLOPs


def counted_flops(function: Any, *args: Any) -> float:
    """FLOPs of a jitted function for such arguments, as XLA counts them; 0 where it does not.

    Where the arguments are on a GPU, the function is compiled for CPUs to count: for a GPU products
    are calls into libraries, which count nothing.
    """
    if jax.default_backend() != "gpu":
        return _compiled_flops(function.lower(*args))
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return 0.0
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if is_array(a) else a, args
    )
    with jax.default_device(device):
        return _compiled_flops(function.lower(*shapes))


def _compiled_flops(lowered: jax.stages.Lowered) -> float:
    return (lowered.compile().cost_analysis() or {}).get("flops", 0.0)


# ---- Linen models


def as_args(caller: str, example_input: ExampleInput) -> tuple:
    """The example input as a tuple of positional arguments."""
    if isinstance(example_input, str):
        raise TypeError(
            f"{caller}: example_input is {example_input!r}; it must be what the model is called "
            "with: arrays or jax.ShapeDtypeStructs, a tuple for several arguments."
        )
    return example_input if isinstance(example_input, tuple) else (example_input,)


def by_site(collection: chex.ArrayTree) -> dict[str, Any]:
    """The memories of a wrapped Linen model, by the names of their sites."""
    return flatten_dict(collection, sep="/")


def as_collection(memories: Mapping[str, Any]) -> dict[str, Any]:
    """Memories by their sites' names, as the collection of a wrapped Linen model."""
    return unflatten_dict(memories, sep="/")
