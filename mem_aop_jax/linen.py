"""Flax Linen: a Dense layer that keeps its memory in a variable collection."""

import collections
import math
import weakref

import chex
import flax.linen as nn
import jax.numpy as jnp
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from mem_aop_jax import checks
from mem_aop_jax.config import MemAOP
from mem_aop_jax.dense import dot_general
from mem_aop_jax.memory import Memory, init_memory

COLLECTION = OVERWRITE_WITH_GRADIENT  # TrainState replaces its variables by their gradients
RNG = "mem_aop"  # apply(..., rngs={RNG: key}), for the random policies


class Dense(nn.Dense):
    """`flax.linen.Dense` whose kernel gradient is Mem-AOP-GD's (arXiv 2110.09164).

    A drop-in: every field of `nn.Dense` but `dot_general` and `dot_general_cls`, the same
    parameters with the same initial values, the same outputs. The gradients of the inputs and of
    the bias are exact.

    `init` puts an empty `Memory` into the collection `COLLECTION`, for as many rows as the example
    input has: initialise with a batch of the training size. The gradient with respect to that
    collection is the next memory. Hand it on with `carry_memory`; or keep all variables in the
    `params` of an unmodified `flax.training.train_state.TrainState`, which overwrites the
    collection with its gradient (there, a layer that takes no part in a step loses its memory, and
    a learning-rate schedule does not rescale it).

    A layer that is called several times in a forward pass has one memory per call. Inside
    `nn.remat` or `nn.jit` the calls share one, which is an error in the next step.

    Without the collection the layer is exact, at any batch size; differentiating it with respect
    to its parameters is then an error if the configuration has a memory.

    Attributes:
      config: what to compute of the kernel gradient; None is an exact layer.

    Example:
      >>> import jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> layer = aop.linen.Dense(4, config=aop.MemAOP(ratio=0.25))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> variables[aop.linen.COLLECTION]["memory"].inputs.shape
      (8, 3)
    """

    config: MemAOP | None = None

    @nn.compact
    def __call__(self, inputs: chex.Array) -> chex.Array:
        """`inputs @ kernel + bias`: `(..., in_features)` to `(..., features)`."""
        if self.dot_general is not None or self.dot_general_cls is not None:
            raise ValueError(
                f"{_name(self)}: aop.linen.Dense has a dot_general of its own; leave dot_general "
                "and dot_general_cls unset, or use flax.linen.Dense."
            )
        in_features = jnp.shape(inputs)[-1]
        kernel = self.param(
            "kernel", self.kernel_init, (in_features, self.features), self.param_dtype
        )
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        contraction = (((inputs.ndim - 1,), (0,)), ((), ()))
        y = _dot_general(self, self.config, inputs, kernel, contraction, self.precision)
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


class DotGeneral(nn.Module):
    """The `dot_general_cls` of a Flax layer, with its memory in a submodule of that layer.

    For `nn.Dense` and `nn.DenseGeneral` (`dot_general_cls`) and the projections of
    `nn.MultiHeadDotProductAttention` (`qkv_dot_general_cls`, `out_dot_general_cls`). The parameters
    and their initial values stay as they are; everything else is as in `Dense`.

    Attributes:
      config: what to compute of the kernel gradient; None is an exact product.

    Example:
      >>> import functools, flax.linen as nn, jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> product = functools.partial(aop.linen.DotGeneral, config=aop.MemAOP(ratio=0.25))
      >>> layer = nn.Dense(4, dot_general_cls=product)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> variables[aop.linen.COLLECTION]["DotGeneral_0"]["memory"].inputs.shape
      (8, 3)
    """

    config: MemAOP | None = None

    @nn.compact
    def __call__(self, lhs: chex.Array, rhs: chex.Array, *args, **options) -> chex.Array:
        """`jax.lax.dot_general`, with the same arguments."""
        return _dot_general(self, self.config, lhs, rhs, *args, **options)


def _dot_general(module, config, lhs, rhs, dimension_numbers, *args, **options):
    """`dot_general` with the memory, the key and the name of a module."""
    (lhs_contracting, _), (lhs_batch, _) = dimension_numbers
    memory = None
    if config is not None and not len(lhs_batch):
        checks.floating(_name(module), lhs, rhs)
        in_features = math.prod(lhs.shape[d] for d in lhs_contracting)
        sizes = lhs.size // in_features, in_features, rhs.size // in_features
        memory = _memory_of_this_call(module, config, *sizes, lhs.dtype)
    return dot_general(
        lhs,
        rhs,
        dimension_numbers,
        *args,
        memory=memory,
        config=config,
        key=module.make_rng(RNG) if module.has_rng(RNG) else None,
        name=_name(module),
        **options,
    )


_calls: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # root scope -> calls by path


def _memory_of_this_call(
    module: nn.Module,
    config: MemAOP | None,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: chex.ArrayDType,
) -> Memory | None:
    """The variable for the n-th call of a module in this forward pass; None where there is none."""
    if config is None or not config.keeps_rows:
        return None
    calls = _calls.setdefault(module.scope.root, collections.Counter())
    name = f"memory_{calls[module.path]}" if calls[module.path] else "memory"
    calls[module.path] += 1
    new = module.is_initializing() and not module.has_variable(COLLECTION, name)
    if new and module.is_mutable_collection(COLLECTION):
        config.selected_rows(rows, _name(module))
        memory = init_memory(config, rows, in_features, out_features, dtype)
        module.put_variable(COLLECTION, name, memory)
    return module.get_variable(COLLECTION, name)


def _name(module: nn.Module) -> str:
    return "/".join(module.path) or type(module).__name__
