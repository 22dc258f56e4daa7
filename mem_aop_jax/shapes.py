"""Shapes of what a function returns, of arguments some of which are shapes themselves."""

from collections.abc import Callable

import chex
import jax


def eval_shape(function: Callable, *args: chex.ArrayTree, **kwargs: chex.ArrayTree):
    """What `jax.eval_shape` returns. Only `jax.ShapeDtypeStruct`s in the arguments are abstract.

    All else stays what it is, for a model that branches on it.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))

    def is_shape(leaf):
        return isinstance(leaf, jax.ShapeDtypeStruct)

    def of(traced):
        traced = iter(traced)
        some = [next(traced) if is_shape(leaf) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(structure, some)
        return function(*args, **kwargs)

    return jax.eval_shape(of, list(filter(is_shape, leaves)))
