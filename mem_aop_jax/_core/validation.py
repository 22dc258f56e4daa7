"""What a layer refuses, and what it says then: what was given, what is wanted, how to mend it.

Every function takes the layer's name first.
"""

import numbers

import jax
import jax.numpy as jnp

from mem_aop_jax._compat import varying_axes
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.memory import Memory, Subspace
from mem_aop_jax._core.policies import Selection
from mem_aop_jax._numerics import accumulation_dtype


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


def memory(name, config, x, sizes, given):
    """The given memory as JAX arrays, if it is one for inputs x and these sizes.

    `sizes` is (rows, in_features, out_features).
    """
    kind = config.memory_kind
    if kind is None:
        raise ValueError(
            f"{name}: got a memory, but the configuration has memory={config.memory!r}, which with "
            f"policy={config.policy!r} is none; pass memory=None to the layer, or configure "
            "MemAOP(memory='rows') or 'subspace'."
        )
    wanted = Memory if kind == "rows" else Subspace
    if not isinstance(given, wanted):
        raise TypeError(
            f"{name}: memory is of type {type(given).__name__}; with memory={kind!r} it must be an "
            f"aop.{wanted.__name__} (a restored dict becomes one again with "
            f"aop.{wanted.__name__}(**memory))."
        )
    given = jax.tree.map(jnp.asarray, given)
    check = _rows if kind == "rows" else _subspace
    check(name, config, x, sizes, given)
    if given.uses.shape != () or given.uses.dtype != jnp.float32:
        raise ValueError(
            f"{name}: memory.uses has shape {given.uses.shape} and dtype {given.uses.dtype}; it "
            "must be a float32 scalar. Use the memory that the last step returned, unchanged."
        )
    return given


def _rows(name, config, x, sizes, given):
    dtype = config.stored_dtype(x.dtype)
    m, n, p = sizes
    held, belongs = m, "layer and one batch size: keep the batch size (drop a last partial batch)"
    if config.memory_slots is not None:
        held, belongs = config.memory_slots, "layer and one number of slots: keep memory_slots"
        share = given.inputs.shape[0] if given.inputs.ndim else 0
        if share and held % share == 0 and share % config.groups == 0:
            held = share  # of a device under shard_map
    anew = f"aop.init_memory(config, {m}, {n}, {p}, jnp.{dtype})"
    for field, shape in (("inputs", (held, n)), ("cotangents", (held, p))):
        array = getattr(given, field)
        if array.shape != shape:
            raise ValueError(
                f"{name}: memory.{field} has shape {array.shape}, but a batch of {m} rows through "
                f"a kernel of shape {(n, p)} needs {shape}. A memory belongs to one "
                f"{belongs}, start anew with {anew}, or, to evaluate, leave the memory out."
            )
        replicated = varying_axes(x) - varying_axes(array)
        if replicated:
            raise ValueError(
                f"{name}: memory.{field} is the same on all devices of the mesh axes "
                f"{sorted(replicated)}, over which the batch is sharded. A memory's rows belong to "
                "the batch's rows: give it the batch's PartitionSpec in shard_map's in_specs and "
                "out_specs (and P() for `uses`)."
            )
        if array.dtype != dtype:
            raise TypeError(
                f"{name}: memory.{field} has dtype {array.dtype}, but inputs of {x.dtype} with "
                f"memory_dtype={config.memory_dtype} need {dtype}. Start anew with {anew}, or set "
                f"memory_dtype=jnp.{array.dtype} in the configuration."
            )


def _subspace(name, config, x, sizes, given):
    m, n, p = sizes
    ranks, dtype = config.held_ranks(n, p), accumulation_dtype(x.dtype)
    wanted = [
        (features, rank) if rank else None for features, rank in zip((n, p), ranks, strict=True)
    ]
    for field, shape in zip(("inputs", "cotangents"), wanted, strict=True):
        array = getattr(given, field)
        found = None if array is None else array.shape
        if found != shape or (array is not None and array.dtype != dtype):
            raise ValueError(
                f"{name}: memory.{field} is {'None' if array is None else f'{array.dtype} {found}'}"
                f", but rank={config.rank} and input_grad={config.input_grad} for a kernel of "
                f"shape {(n, p)} and inputs of {x.dtype} need "
                f"{'None' if shape is None else f'{dtype} {shape}'}. Start anew with "
                f"aop.init_memory(config, {m}, {n}, {p}, jnp.{x.dtype})."
            )


def differentiable(name, config, rows, memory, key):
    """All that the backward pass needs beside the inputs."""
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
            "jax.random.key each step (in Linen: apply(..., rngs={aop.linen.RNG: key}), and for "
            "layers inside nn.scan or nn.vmap split_rngs={aop.linen.RNG: True})."
        )
    config.selected_rows(rows, name)


def selection(name, config, policy, returned, k):
    """What a policy returned, if it is a choice of k rows that goes with the memory."""
    wanted = f"aop.Selection(indices, weights) with {k} integer indices, of shape ({k},)"
    if not isinstance(returned, Selection):
        raise TypeError(
            f"{name}: policy {policy} returned {type(returned).__name__}; it must return {wanted}."
        )
    indices, weights = returned
    indices = jnp.asarray(indices)
    if indices.shape != (k,) or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"{name}: policy {policy} returned indices of shape {indices.shape} and dtype "
            f"{indices.dtype}; it must return {wanted}."
        )
    if weights is None and config.memory_kind == "subspace":
        raise ValueError(
            f"{name}: policy {policy} returned no weights. With memory='subspace' the rows that it "
            "does not choose are lost: their weight must be on those that it chooses, so that the "
            "sum is unbiased. Return weights, or use memory='rows' or None."
        )
    if weights is not None and config.memory_kind == "rows":
        raise ValueError(
            f"{name}: policy {policy} returned weights. With memory='rows' the rows that it does "
            "not choose come back, so weights would count them twice. Return weights=None, or use "
            "memory=None or 'subspace'."
        )
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.shape != (k,) or not jnp.issubdtype(weights.dtype, jnp.floating):
            raise ValueError(
                f"{name}: policy {policy} returned weights of shape {weights.shape} and dtype "
                f"{weights.dtype}; they must be floating of shape ({k},), or None for ones."
            )
    return indices, weights
