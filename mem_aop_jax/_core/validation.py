"""What a layer refuses, and what it says then: what was given, what is wanted, how to mend it.

The first argument is the layer's name, or its call.
"""

import numbers
import operator
from typing import NoReturn

import jax.numpy as jnp
from jax import dtypes

from mem_aop_jax._core.config import MEMORIES, MemAOP
from mem_aop_jax._core.policies import Selection


def config(name, given):
    """A `MemAOP` or None."""
    if not (given is None or isinstance(given, MemAOP)):
        raise TypeError(
            f"{name}: config is of type {type(given).__name__}; it must be an aop.MemAOP, or None "
            "for an exact layer."
        )


def min_speedup(name, given):
    """A positive number, or None."""
    number = isinstance(given, numbers.Real) and not isinstance(given, bool)
    if given is None or (number and 0 < given < float("inf")):
        return
    raise ValueError(
        f"{name}: got min_speedup={given!r}; it must be a positive number, for instance 1.05, or "
        "None."
    )


def shapes(name, x, kernel):
    """x `(..., in_features)` and kernel `(in_features, out_features)`."""
    if kernel.ndim != 2:
        raise ValueError(
            f"{name}: kernel has shape {kernel.shape}; it must have two dimensions, (in_features, "
            "out_features). Reshape it, and the result."
        )
    if x.ndim == 0 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name}: x has shape {x.shape} and kernel {kernel.shape}; the last dimension of x "
            "must be the first of kernel, (..., in_features) and (in_features, out_features)."
        )


def floating(name, x, kernel):
    """Real floating dtypes."""
    for argument, array in (("x", x), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{name}: {argument} has dtype {array.dtype}; Mem-AOP needs a floating dtype. "
                f"Convert it, for instance with {argument}.astype(jnp.float32)."
            )


def whole_number(name, argument, value, smallest=0):
    """A whole number, of Python or NumPy."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {argument} is {value!r}; it must be a whole number.") from None
    if number < smallest:
        raise ValueError(f"{name}: {argument} is {number}; it must be at least {smallest}.")
    return number


def key(name, key):
    """A PRNG key, of either kind, or None."""
    dtype = getattr(key, "dtype", None)
    is_legacy = dtype == jnp.uint32 and key.ndim > 0
    if key is None or is_legacy or (dtype is not None and jnp.issubdtype(dtype, dtypes.prng_key)):
        return
    given = type(key).__name__ if dtype is None else f"{dtype}{list(key.shape)}"
    raise TypeError(
        f"{name}: key is {given}; it must be a key of jax.random, such as jax.random.key(0), or "
        "None."
    )


def differentiable(call, memory, key):
    """A memory and a key, where the backward pass needs them, and k that fits the rows."""
    name, config = call.name, call.config
    if config.memory_kind is not None and memory is None:
        raise ValueError(
            f"{name}: differentiated with respect to its kernel without its memory. Pass the "
            "memory (aop.init_memory at the start, then what the last step returned; in Linen the "
            "collection aop.linen.COLLECTION; a call that init did not see has none; in NNX "
            "model.train() switches it on), or configure MemAOP(memory=None). Only evaluation "
            "works without."
        )
    if config.needs_key and key is None:
        raise ValueError(
            f"{name}: {config.why_key} and got no key. Pass key= a new "
            "jax.random.key each step (to a function of aop.approximate after the memory; in "
            "Linen: apply(..., rngs={aop.linen.RNG: key}), and for layers inside nn.scan or "
            "nn.vmap split_rngs={aop.linen.RNG: True})."
        )
    config.selected_rows(call.sizes[0], name)


def not_differentiable(call, option) -> NoReturn:
    """An approximate gradient that is differentiated has derivatives with most options alone."""
    raise ValueError(
        f"{call.name}: its approximate gradient is differentiated once more, and with {option} it "
        "has no derivative. Use MemAOP(memory=None), or memory='subspace', without input_grad; or "
        "config=None, an exact layer, in what is differentiated twice (a Hessian, an inner step)."
    )


def selection(name, config, returned, k):
    """What a policy returned, as JAX arrays; k rows, with weights if the memory asks for them."""
    policy = f"{name}: policy {config.policy!r}"
    wanted = f"aop.Selection(indices, weights) with {k} integer indices, of shape ({k},)"
    if not isinstance(returned, Selection):
        raise TypeError(f"{policy} returned {type(returned).__name__}; it must return {wanted}.")
    indices, weights = returned
    indices = jnp.asarray(indices)
    if indices.shape != (k,) or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"{policy} returned indices of shape {indices.shape} and dtype "
            f"{indices.dtype}; it must return {wanted}."
        )
    wants_weights = MEMORIES[config.memory_kind].weights if config.memory_kind else None
    if weights is None and wants_weights is True:
        raise ValueError(
            f"{policy} returned no weights. With memory={config.memory_kind!r} the "
            "rows that it does not choose are lost: their weight must be on those that it "
            "chooses, so that the sum is unbiased. Return weights, or use memory='rows' or None."
        )
    if weights is not None and wants_weights is False:
        raise ValueError(
            f"{policy} returned weights. With memory={config.memory_kind!r} the "
            "rows that it does not choose come back, so weights would count them twice. Return "
            "weights=None, or use memory=None or 'subspace'."
        )
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.shape != (k,) or not jnp.issubdtype(weights.dtype, jnp.floating):
            raise ValueError(
                f"{policy} returned weights of shape {weights.shape} and dtype "
                f"{weights.dtype}; they must be floating of shape ({k},), or None for ones."
            )
    return Selection(indices, weights)
