"""Optax: the transform that carries the memory in the optimizer state."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax.core.meta import AxisMetadata, unbox
from jax.sharding import NamedSharding, PartitionSpec

from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.memory import (
    LayerMemory,
    Memory,
    Subspace,
    carried,
    check_learning_rate,
    first_directions,
    rate_factor,
)
from mem_aop_jax._core.probe import is_memory

_MISSING = object()


class CarryMemoryState(NamedTuple):
    """State of `carry_memory`.

    Attributes:
      memory: the memory for the next step, of the structure given to `carry_memory`.
      count: `()` int32, the number of updates so far.
    """

    memory: chex.ArrayTree
    count: chex.Array


def carry_memory(
    memory: chex.ArrayTree, learning_rate: optax.ScalarOrSchedule | None = None
) -> optax.GradientTransformationExtraArgs:
    """Holds the layers' memories in the optimizer state; passes the updates through unchanged.

    The new memory, which `jax.grad` returns as the gradient of the old one, goes in as the keyword
    `memory` of `update`; `get_memory(opt_state)` takes it out for the next step. A layer that took
    no part in the loss keeps its memory.

    The memory is in gradient units. Where the learning rate eta changes from one step to the next,
    the paper's algorithm (which keeps sqrt(eta) times as much) multiplies it by
    `sqrt(eta_t / eta_{t+1})`; where eta_{t+1} is 0 it stays. A `Subspace` has no units.

    Chain it outside `optax.MultiSteps`, which would drop the memory of all micro-steps but the
    last; the rate then changes every so many updates: `lambda count: schedule(count // every_k)`.
    Never average a memory over devices or micro-batches: its rows belong to the batch's.

    Args:
      memory: any pytree of `Memory` and `Subspace`, for instance the collection
        `aop.linen.COLLECTION`; None and an empty one are fine. The state starts from it, without a
        copy: a training step that donates its state takes the buffers with it. What Flax's fp8
        layers keep in that collection is overwritten by its gradient, as Flax does.
        `jax.ShapeDtypeStruct` in place of each array stands for a first memory, so that
        `jax.jit(tx.init, out_shardings=...)` makes it where it belongs.
      learning_rate: the optimizer's schedule, if it has one, as a function of the number of
        updates. A constant changes nothing, and what `optax.inject_hyperparams` hands to the
        function it wraps is one: give the schedule to a `carry_memory` outside.

    Returns:
      A transformation to chain in front of any optimizer.

    Raises:
      TypeError: a leaf of `memory` that is neither; a learning rate that is neither a number nor a
        schedule; from `update`, without `memory=`.
      ValueError: from `update`, for a memory of another structure, shape or dtype, or one that
        was added up, scaled or averaged (found where values are known, that is, outside `jit`, and
        in `shard_map`; else the layer's next weight gradient is NaN); for a schedule that is
        negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mem_aop_jax as aop
      >>> config = aop.MemAOP(k=2)
      >>> kernel, memory = jnp.ones((3, 4)), aop.init_memory(config, 8, 3, 4)
      >>> tx = optax.chain(aop.carry_memory(memory), optax.adam(1e-3))
      >>> opt_state = tx.init(kernel)
      >>> def loss(kernel, memory):
      ...     return aop.dense(jnp.ones((8, 3)), kernel, memory, config=config).sum()
      >>> grad, memory = jax.grad(loss, argnums=(0, 1))(kernel, aop.get_memory(opt_state))
      >>> updates, opt_state = tx.update(grad, opt_state, kernel, memory=memory)
    """

    _check_leaves(memory)
    check_learning_rate("carry_memory", learning_rate)

    def init(params):
        del params
        live = jax.tree.map(_live_memory, memory, is_leaf=is_memory)
        return CarryMemoryState(live, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, memory=_MISSING, **extra_args):
        del params, extra_args
        if memory is _MISSING:
            raise TypeError(
                "carry_memory: update got no memory. Differentiate the loss with respect to the "
                "memory too, and pass its gradient: tx.update(grads, opt_state, params, "
                "memory=memory). (Flax's TrainState.apply_gradients passes none on: call "
                "state.tx.update.)"
            )
        _check_same_kind(state.memory, memory)
        factor = rate_factor(learning_rate, state.count)

        def carry(old, new):
            return carried("carry_memory", old, new, factor) if is_memory(old) else new

        memory = jax.tree.map(carry, state.memory, memory, is_leaf=is_memory)
        return updates, CarryMemoryState(memory, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def mem_aop_sgd(
    learning_rate: optax.ScalarOrSchedule, memory: chex.ArrayTree, momentum: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """The paper's optimizer: `carry_memory` and `optax.sgd` with the same learning rate.

    Args:
      learning_rate: a number or a schedule.
      memory: as in `carry_memory`.
      momentum: as in `optax.sgd`; the paper has none.
    """
    return optax.chain(carry_memory(memory, learning_rate), optax.sgd(learning_rate, momentum))


def get_memory(opt_state: optax.OptState) -> chex.ArrayTree:
    """The memory in an optimizer state, wherever `carry_memory` stands in the chain.

    Raises:
      ValueError: no `carry_memory` state in `opt_state`, or more than one, or one inside
        `optax.MultiSteps`.
    """
    states = _find(CarryMemoryState, opt_state)
    if len(states) != 1:
        raise ValueError(
            f"get_memory: found {len(states)} carry_memory states in the optimizer state; there "
            "must be exactly one. Chain one aop.carry_memory, with the memory of the whole model, "
            "into the optimizer, and restore checkpoints into the structure of tx.init(params)."
        )
    if any(_find(CarryMemoryState, node) for node in _find(optax.MultiStepsState, opt_state)):
        raise ValueError(
            "get_memory: carry_memory is inside optax.MultiSteps, which drops the memory of all "
            "micro-steps but the last; put it outside: optax.chain(aop.carry_memory(memory), "
            "optax.MultiSteps(optimizer, every_k_schedule))."
        )
    return states[0].memory


def replace_memory(opt_state: optax.OptState, memory: chex.ArrayTree) -> optax.OptState:
    """The optimizer state with another memory, for instance an empty one for a new batch size.

    Moments and counts stay, so a schedule goes on where it was.

    Args:
      opt_state: the state of an optimizer with `carry_memory` in it.
      memory: as in `carry_memory`.

    Raises:
      TypeError: as in `carry_memory`.
      ValueError: as in `get_memory`.
    """
    get_memory(opt_state)
    new = carry_memory(memory).init(None).memory
    return jax.tree.map(
        lambda node: node._replace(memory=new) if isinstance(node, CarryMemoryState) else node,
        opt_state,
        is_leaf=lambda node: isinstance(node, CarryMemoryState),
    )


def state_shardings(
    tx: optax.GradientTransformation,
    params: chex.ArrayTree,
    params_sharding: NamedSharding | chex.ArrayTree,
    batch_sharding: NamedSharding,
) -> chex.ArrayTree:
    """Where the optimizer state belongs: memory rows with the batch, moments with the parameters.

    A `Subspace` is replicated.

    For `jax.jit(tx.init, out_shardings=...)`, for the in and out shardings of a training step, and
    for the target of a restored checkpoint; for `shard_map`, take the `.spec` of each.

    Args:
      tx: the optimizer, with `carry_memory` in it.
      params: the parameters, or a `jax.ShapeDtypeStruct` for each; or boxes (`nn.Partitioned`).
      params_sharding: the sharding of all parameters, or a tree of one for each, for instance
        `nn.get_sharding(params, mesh)`.
      batch_sharding: the sharding of the batch. Only its first axis counts, the rows.

    Returns:
      A tree of `NamedSharding` like `tx.init(params)`. What has neither a parameter's shape nor
      rows, such as step counts and factored moments, is replicated.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mem_aop_jax as aop
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> kernel, memory = jnp.ones((3, 4)), aop.init_memory(aop.MemAOP(k=2), 8, 3, 4)
      >>> tx = optax.chain(aop.carry_memory(memory), optax.adam(1e-3))
      >>> rows, everywhere = (NamedSharding(mesh, PartitionSpec(*s)) for s in (["data"], []))
      >>> shardings = aop.state_shardings(tx, kernel, everywhere, rows)
      >>> opt_state = jax.jit(tx.init, out_shardings=shardings)(kernel)
      >>> tuple(aop.get_memory(opt_state).inputs.sharding.spec)
      ('data',)
    """
    mesh = batch_sharding.mesh
    replicated = NamedSharding(mesh, PartitionSpec())
    if isinstance(params_sharding, NamedSharding):
        params_sharding = jax.tree.map(lambda _: params_sharding, params, is_leaf=_is_box)
    params_sharding = unbox(params_sharding)

    def rows_with_the_batch(node, sharding):
        if not isinstance(node, Memory):
            return sharding
        stacked = [None] * (node.inputs.ndim - 2)
        rows = NamedSharding(mesh, PartitionSpec(*stacked, *batch_sharding.spec[:1]))
        return Memory(rows, rows, replicated)

    def as_the_parameter(leaf, param, sharding):
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return sharding if jnp.shape(unbox(leaf)) == jnp.shape(unbox(param)) else replicated

    state = jax.eval_shape(tx.init, params)
    shardings = optax.tree_utils.tree_map_params(
        tx,
        as_the_parameter,
        state,
        params,
        params_sharding,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode) or _is_box(node),
    )
    return jax.tree.map(
        rows_with_the_batch, state, shardings, is_leaf=lambda node: is_memory(node) or _is_box(node)
    )


def _is_box(node):
    return isinstance(node, AxisMetadata)


def _find(kind, tree):
    """The nodes of a type in a pytree; not those inside of such a node."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


FP8_NAMES = "_scale", "_amax_history"  # how those of Flax's fp8 layers end


def _check_leaves(memory):
    """Memories; and beside them in a collection of Flax, what its fp8 layers keep there."""

    def is_leaf(node):
        return is_memory(node) or isinstance(node, MemAOP)

    for path, leaf in jax.tree.leaves_with_path(memory, is_leaf=is_leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if not isinstance(leaf, LayerMemory) and not name.endswith(FP8_NAMES):
            raise TypeError(
                f"carry_memory: memory has a leaf of type {type(leaf).__name__}; it must be a "
                "pytree of aop.Memory or aop.Subspace alone, such as variables[aop.linen."
                "COLLECTION] (a restored dict becomes a memory again with aop.Memory(**memory) or "
                "aop.Subspace(**memory))."
            )


def _live_memory(memory):
    """Arrays; a first memory where there are only shapes."""
    if not is_memory(memory):
        return _live_array(memory, jnp.zeros)
    first = first_directions if isinstance(memory, Subspace) else jnp.zeros
    matrices = [_live_array(leaf, first) for leaf in memory[:-1]]
    return type(memory)(*matrices, _live_array(memory[-1], jnp.zeros))


def _live_array(leaf, first):
    if leaf is None:
        return None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return first(leaf.shape, leaf.dtype)
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
        raise ValueError(
            "carry_memory: the memory given was donated to a training step and is gone; make it "
            "anew with aop.init_memory (or model.init) and build the optimizer again."
        )
    return jnp.asarray(leaf)


def _check_same_kind(old, new):
    """Same structure, shapes and dtypes."""

    def kinds(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]

    if kinds(old) != kinds(new):
        raise ValueError(
            f"carry_memory: the memory given to update is {_describe(new)}, but the state holds "
            f"{_describe(old)}. Pass the gradient of the loss with respect to "
            "aop.get_memory(opt_state), unchanged."
        )


def _describe(tree):
    return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf).name}{list(jnp.shape(leaf))}", tree)
