"""What the examples' trainings share: a state, a step, and the batches of a pass over the data."""

from typing import Any

import chex
import jax
import optax

import mem_aop_jax as aop

Optimizer = optax.GradientTransformationExtraArgs
State = tuple[chex.ArrayTree, optax.OptState]  # parameters; and the optimizer's, with the memory


def first_state(
    approx: aop.Approximated, optimizer: Optimizer, params: chex.ArrayTree, *batch: Any
) -> State:
    """The state of an optimizer with `aop.carry_memory({})` in it; arguments as in `train_step`."""
    return params, aop.replace_memory(optimizer.init(params), approx.init(params, *batch))


def train_step(
    approx: aop.Approximated,
    optimizer: Optimizer,
    state: State,
    key: jax.Array,
    *batch: Any,
    has_aux: bool = False,
) -> tuple[State, Any]:
    """One update; returns the next state, and the loss before it.

    Args:
      approx: the loss, a function of the parameters and the batch.
      optimizer: with `aop.carry_memory` in it.
      state: from `first_state` or the last step.
      key: for the random policies, a new one in each step.
      *batch: the arguments of the loss.
      has_aux: whether the loss comes with something else, as in `jax.grad`.
    """
    params, opt_state = state
    value_and_grad = jax.value_and_grad(approx, argnums=(0, 1), has_aux=has_aux)
    loss, (grads, memory) = value_and_grad(params, aop.get_memory(opt_state), key, *batch)
    updates, opt_state = optimizer.update(grads, opt_state, params, memory=memory)
    return (optax.apply_updates(params, updates), opt_state), loss


def shuffled_batches(key: jax.Array, rows: int, batch: int) -> jax.Array:
    """Indices of rows in random order, `(batches, batch)`; a last, partial batch is dropped."""
    batches = rows // batch
    return jax.random.permutation(key, rows)[: batches * batch].reshape(batches, batch)
