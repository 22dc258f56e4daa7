"""Computations for which one TPU has a kernel.

A kernel is one device's. Where a program is partitioned automatically, which no kernel is, the
compiler's version takes its place; nobody but the lowering knows, so it is there that one is taken.
With MEM_AOP_JAX_KERNELS=0 in the environment it is always the compiler's, and where kernels do not
compile: with x64, for its loops, and for TPU v2 and v3, for products and for copies of single rows.
"""

import functools
import os
from collections.abc import Callable

import chex
import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

OLD = "TPU v2", "TPU v3"  # kinds of devices


def kernel_or_xla(kernel: Callable, compute: Callable, *args: chex.ArrayTree) -> chex.ArrayTree:
    """`compute(*args)`, which `kernel(*args)` computes where each device is a TPU by itself.

    The kernel is traced where the program is lowered: nothing is, where it is for another device.
    """
    leaves, structure = jax.tree.flatten(args)
    jaxpr, shapes = jax.make_jaxpr(compute, return_shape=True)(*args)
    precision, keys = jax.config.jax_default_matmul_precision, jax.config.jax_default_prng_impl

    def of_leaves(*leaves):
        with jax.default_matmul_precision(precision), jax.default_prng_impl(keys):
            return jax.tree.leaves(kernel(*jax.tree.unflatten(structure, leaves)))

    found = _kernel_or_xla.bind(*leaves, jaxpr=jaxpr, kernel=of_leaves)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


_kernel_or_xla = Primitive("mem_aop_kernel_or_xla")
_kernel_or_xla.multiple_results = True


@_kernel_or_xla.def_impl
def _run(*args, jaxpr, **_):
    return jaxpr_as_fun(jaxpr)(*args)


@_kernel_or_xla.def_abstract_eval
def _results(*_, jaxpr, **__):
    return jaxpr.out_avals


def _batched(args, axes, **params):
    found = jax.vmap(functools.partial(_run, **params), axes)(*args)
    return found, [0] * len(found)


def _differentiated(args, tangents, **params):
    tangents = map(ad.instantiate_zeros, tangents)
    return jax.jvp(functools.partial(_run, **params), tuple(args), tuple(tangents))


def _lowered_for_tpu(context, *args, kernel, **params):
    module = context.module_context
    wanted = os.environ.get("MEM_AOP_JAX_KERNELS", "1") != "0" and not jax.config.jax_enable_x64
    wanted &= {device.device_kind for device in module.backend.devices()}.isdisjoint(OLD)
    if wanted and _is_of_one_device(module.axis_context):
        return mlir.lower_fun(kernel)(context, *args)
    return _lowered(context, *args, **params)


def _is_of_one_device(program):
    """Whether each device runs it by itself. Where JAX does not say so, it is not."""
    if hasattr(program, "manual_axes"):
        manual = set(program.manual_axes) | set(program.mesh.manual_axes)
        return manual == set(program.mesh.axis_names)
    return getattr(program, "num_devices", None) == 1


_lowered = mlir.lower_fun(_run)
ad.primitive_jvps[_kernel_or_xla] = _differentiated
batching.primitive_batchers[_kernel_or_xla] = _batched
mlir.register_lowering(_kernel_or_xla, _lowered)
mlir.register_lowering(_kernel_or_xla, _lowered_for_tpu, platform="tpu")
