"""The choice between a kernel for one kind of device and XLA's version of the same computation.

XLA cannot partition a kernel over devices, and only the lowering knows whether a program will be
partitioned. So the choice is made there: `kernel_or_xla` binds a primitive that holds both.

XLA's version runs, too, with MEM_AOP_JAX_KERNELS=0 in the environment, and where kernels do not
compile: with x64, because of their loops, and on `OLD_CHIPS`, because of their products and their
copies of single rows; on GPUs before Ampere, and where a program for GPUs is exported.
"""

import functools
import os
from collections.abc import Callable

import chex
import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from mem_aop_jax._compat import is_exported, jax_option, pallas_triton

OLD_CHIPS = "TPU v2", "TPU v3"
AMPERE = 8.0  # compute capability


def kernel_or_xla(
    kernel: Callable, xla: Callable, *args: chex.ArrayTree, platform: str = "tpu"
) -> chex.ArrayTree:
    """`kernel(*args)` in a program of a single device of the platform, `xla(*args)` in any other.

    The kernel is traced only if the program is lowered for the platform, with the settings of now.
    """
    leaves, structure = jax.tree.flatten(args)
    jaxpr, shapes = jax.make_jaxpr(xla, return_shape=True)(*args)
    precision, prng = map(jax_option, ("jax_default_matmul_precision", "jax_default_prng_impl"))

    def flat_kernel(*leaves):
        with jax.default_matmul_precision(precision), jax.default_prng_impl(prng):
            return jax.tree.leaves(kernel(*jax.tree.unflatten(structure, leaves)))

    results = _PRIMITIVES[platform].bind(*leaves, jaxpr=jaxpr, kernel=flat_kernel)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


cuda_kernel_or_xla = functools.partial(kernel_or_xla, platform="cuda")


def _run_xla(*args, jaxpr, **_):
    return jaxpr_as_fun(jaxpr)(*args)


def _result_types(*_, jaxpr, **__):
    return jaxpr.out_avals


def _batch(args, axes, **params):
    results = jax.vmap(functools.partial(_run_xla, **params), axes)(*args)
    return results, [0] * len(results)


def _differentiate(args, tangents, **params):
    tangents = map(ad.instantiate_zeros, tangents)
    return jax.jvp(functools.partial(_run_xla, **params), tuple(args), tuple(tangents))


def _lower_kernel(platform, context, *args, kernel, **params):
    module = context.module_context
    if (
        os.environ.get("MEM_AOP_JAX_KERNELS", "1") != "0"
        and not jax.config.jax_enable_x64
        and not any(map(_is_old, module.backend.devices()))
        and not (platform == "cuda" and (is_exported(module) or pallas_triton is None))
        and _runs_on_one_device(module.axis_context)
    ):
        return mlir.lower_fun(kernel)(context, *args)
    return _lower_xla(context, *args, **params)


def _is_old(device):
    """Whether kernels do not compile for it."""
    capability = getattr(device, "compute_capability", AMPERE)  # of a GPU that is here
    return device.device_kind in OLD_CHIPS or float(capability) < AMPERE


def _runs_on_one_device(axis_context):
    """Whether each device runs the program by itself; False if JAX does not say so."""
    if hasattr(axis_context, "manual_axes"):
        manual = set(axis_context.manual_axes) | set(axis_context.mesh.manual_axes)
        return manual == set(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", None) == 1


_lower_xla = mlir.lower_fun(_run_xla)


def _primitive_for(platform):
    primitive = Primitive(f"mem_aop_{platform}_kernel_or_xla")
    primitive.multiple_results = True
    primitive.def_impl(_run_xla)
    primitive.def_abstract_eval(_result_types)
    ad.primitive_jvps[primitive] = _differentiate
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, _lower_xla)
    lower = functools.partial(_lower_kernel, platform)
    mlir.register_lowering(primitive, lower, platform=platform)
    return primitive


_PRIMITIVES = {platform: _primitive_for(platform) for platform in ("tpu", "cuda")}
