"""How good the approximate gradients of a model are on a batch, and whether they pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax._analysis.model_gradients import floating_leaves
from mem_aop_jax._analysis.subject import counted_flops, loss_of
from mem_aop_jax._approximate.approximated import Approximated, sites_of
from mem_aop_jax._approximate.tracing import path_string, split_arrays
from mem_aop_jax._core.measure import variance_of_draws
from mem_aop_jax._core.probe import Measured, Probe, is_memory
from mem_aop_jax._numerics import safe_divide
from mem_aop_jax._tables import markdown


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """The measurements of `diagnostics`: a pytree of scalars, whose `str` is a table.

    The rule: an estimate adds the relative variance v to the gradient, and its step costs c of an
    exact step. Where the batch's own noise dominates its gradient (`noise` near 1) the estimate
    acts like a batch smaller by 1 + v, and pays if (1 + v) c < 1. Where the batch is so large that
    its noise hardly matters (`noise` near 0), v is nearly free, and the estimate pays if c < 1.

    Attributes:
      layers: for each layer that took part in the loss, by the path of its memory.
      model: for the kernels of all these layers together. Its c counts the FLOPs of all of them;
        the energies, the ranks, `input_v` and `chosen` are means over the layers. Where gradients
        of inputs are approximate, their errors reach all parameters below: then the model's norms,
        error, cosine and v belong to the gradient of all parameters, drawn as a whole.
      step_cost: FLOPs of the compiled gradient of the whole loss, relative to the exact one, as the
        compiler counts them: a refresh in every step, the body of a scan once. None where it
        counts nothing.
    """

    layers: dict[str, Measured]
    model: Measured
    step_cost: chex.Array | None

    def verdict(self, layer: str | None = None) -> chex.Array:
        """(1 + error^2) c of a layer, or of the model; below 1 the estimate pays.

        For an unbiased estimate error^2 is v. For the paper's, rows that wait count as lost.
        """
        measured = self.model if layer is None else self.layers[layer]
        return (1 + measured.error**2) * measured.c

    def __str__(self) -> str:
        head = (
            *("error", "cosine", "v", "v of dX", "noise", "c", "(1+error²)c", "pays"),
            *("X inside", "G inside", "X rank 90%", "G rank 90%", "chosen"),
        )
        lines = []
        for name in (*self.layers, None):
            row = self.model if name is None else self.layers[name]
            verdict = float(self.verdict(name))
            figures = row.error, row.cosine, row.v, row.input_v, row.noise, row.c, verdict
            lines.append(
                (
                    "**model**" if name is None else name,
                    *(f"{float(x):.3g}" for x in figures),
                    "yes" if verdict < 1 else "if the batch is large" if row.c < 1 else "no",
                    *(f"{float(x):.2f}" for x in (row.inputs_inside, row.cotangents_inside)),
                    *(f"{float(x):.0f}" for x in (row.inputs_rank, row.cotangents_rank)),
                    f"{float(row.chosen):.2f}",
                )
            )
        return markdown(("layer", *head), lines)


def diagnostics(
    loss_fn: Callable | Approximated,
    params: chex.ArrayTree,
    memory: chex.ArrayTree,
    *args: Any,
    draws: int = 8,
    has_aux: bool = False,
    count_flops: bool = True,
) -> Diagnostics:
    """Measures the approximate gradients of a model on one batch, against the exact ones.

    One backward pass through the exact model measures each layer's gradient where it is computed,
    with the exact gradient coming from above. A call costs that pass, `draws` approximate gradients
    and an eigendecomposition per layer, and compiles anew: call it now and then, not in every step.
    Where gradients of inputs are approximate, it takes `draws` more backward passes. Call it
    outside of `pmap` and `shard_map`.

    Args:
      loss_fn: `loss_fn(params, memory, *args)`, the loss that is trained: what `aop.approximate`
        returns, or any function of memories.
      params: as in training.
      memory: as in training: the memories of the layers to measure. A layer without one (such as
        `MemAOP(policy="priority")`) needs a `Probe` there, which `aop.linen.probes` makes; a
        function of `aop.approximate` does not.
      *args: the key, the batch and all other arguments of `loss_fn`. All are traced; of a function
        of `aop.approximate` the arrays are, as in its call.
      draws: how many approximate gradients to draw, with keys split from each layer's key.
      has_aux: whether `loss_fn` returns `(loss, aux)`, as in `jax.grad`; for a function of
        `aop.approximate` it need not be said.
      count_flops: whether to compile the gradients of the whole loss, for `step_cost`.

    Raises:
      ValueError: draws below 2; no memory; a memory that several calls share.

    Example:
      >>> import jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> config = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=1)
      >>> memory = {"layer": aop.init_memory(config, 8, 3, 4)}
      >>> x = jnp.arange(24.0).reshape(8, 3)
      >>> def loss_fn(kernel, memory, x, key):
      ...     return jnp.sum(aop.dense(x, kernel, memory["layer"], config=config, key=key) ** 2)
      >>> found = aop.diagnostics(loss_fn, jnp.ones((3, 4)), memory, x, jax.random.key(0))
      >>> bool(found.layers["layer"].cosine > 0.9), float(found.layers["layer"].inputs_rank)
      (True, 1.0)
    """
    if draws < 2:
        raise ValueError(f"diagnostics: got draws={draws}; a variance needs at least 2.")
    name_of: Callable[[tuple], str] = _name_in_collection
    if isinstance(loss_fn, Approximated):
        key, *rest = args
        sites = sites_of(loss_fn, params, *rest)
        probes = {site.name: Probe.of(None, draws, site.all_runs) for site in sites}
        memory, name_of, has_aux = probes | dict(memory or {}), path_string, False
        loss_fn, args = _of_arrays(loss_fn, key, *rest)
    memory = jax.tree.map(
        lambda m: m if isinstance(m, Probe) else Probe.of(m, draws, jnp.shape(m.uses)),
        memory,
        is_leaf=is_memory,
    )

    def map_probes(change: Callable[[Probe], Any]) -> chex.ArrayTree:
        return jax.tree.map(change, memory, is_leaf=is_memory)

    probes = map_probes(lambda probe: dataclasses.replace(probe, draws=draws))
    exact_probes = map_probes(lambda probe: dataclasses.replace(probe, draws=0))
    measured = jax.jit(jax.grad(loss_fn, argnums=1, has_aux=has_aux))(params, probes, *args)
    layers = _layers_by_name(measured[0] if has_aux else measured, name_of)
    model = _model_figures(list(layers.values()))
    if any(layer.input_v > 0 for layer in layers.values()):
        grad_fn = jax.jit(jax.grad(loss_fn, has_aux=has_aux, allow_int=True))

        def gradient(probes: chex.ArrayTree) -> chex.ArrayTree:
            result = grad_fn(params, probes, *args)
            return result[0] if has_aux else result

        def draw_probes(number: int) -> chex.ArrayTree:
            return map_probes(
                lambda probe: dataclasses.replace(
                    probe, draws=0, draw=jnp.full(jnp.shape(probe.uses), number, jnp.int32)
                )
            )

        estimates = (gradient(draw_probes(number)) for number in range(draws))
        model = model._replace(**_gradient_figures(gradient(exact_probes), estimates))

    step_cost = None
    if count_flops:
        gradients = jax.jit(jax.grad(loss_fn, argnums=(0, 1), has_aux=has_aux, allow_int=True))
        plain = map_probes(lambda probe: probe.memory)
        ours, exact = (counted_flops(gradients, params, m, *args) for m in (plain, exact_probes))
        if min(ours, exact) > 0:
            step_cost = jnp.asarray(ours / exact, jnp.float32)
    return Diagnostics(layers, model, step_cost)


def _of_arrays(approx: Approximated, *args: Any) -> tuple[Callable, tuple]:
    """The loss as a function of (params, memory, *arrays), and the arrays among the arguments."""
    arrays, rest = split_arrays(args)

    def loss_fn(params: Any, memory: Any, *arrays: chex.Array) -> chex.Array:
        return loss_of(approx(params, memory, *rest.with_arrays(arrays)))

    return loss_fn, tuple(arrays)


def _name_in_collection(path: tuple) -> str:
    """The layer whose memory has this path, in a collection, an NNX state or anybody's tree."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey):
        path = path[:-1]  # the value of an NNX variable
    name = f"/{path_string(path)}".removesuffix("/memory").removesuffix("/kernel")
    return name.removeprefix("/") or "layer"


def _layers_by_name(
    measured: chex.ArrayTree, name_of: Callable[[tuple], str]
) -> dict[str, Measured]:
    """The measurements of each layer that took part in the loss, from the probes' gradient."""
    probes = jax.tree.leaves_with_path(measured, is_leaf=is_memory)
    layers = {}
    for path, probe in probes:
        name = name_of(path)
        for index in np.ndindex(probe.uses.shape):  # each layer of a stack
            number = f"[{','.join(map(str, index))}]" if index else ""
            layers[name + number] = jax.tree.map(lambda a, i=index: a[i], probe.measured)
    for name, layer in layers.items():
        if layer.uses not in (0, 1):
            raise ValueError(
                f"diagnostics: the memory of {name} was used {layer.uses} times. Each use in a "
                "step needs a memory of its own (in nn.remat or nn.jit, call a layer once)."
            )
    layers = {name: layer for name, layer in layers.items() if layer.uses}
    if not layers:
        raise ValueError(
            f"diagnostics: of {len(probes)} memories none took part in the loss. Pass what the "
            "layers are trained with (aop.get_memory(opt_state), variables[aop.linen.COLLECTION], "
            "the aop.nnx.Memory state); for Linen layers without a memory, "
            "aop.linen.probes(model, memory, rngs, example_input)."
        )
    return layers


def _model_figures(layers: Sequence[Measured]) -> Measured:
    """Figures for the kernels of all layers: their draws are independent, so squares add up."""
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *layers)
    norm = _norm(stacked.gradient_norm)
    share = safe_divide(stacked.gradient_norm, norm)
    estimate_norm = _norm(stacked.estimate_norm)
    estimate_share = safe_divide(stacked.estimate_norm, estimate_norm)

    def sum_of_squares(relative: chex.Array) -> chex.Array:
        return jnp.sum(relative * share**2)

    means = jax.tree.map(jnp.mean, stacked)
    return means._replace(
        gradient_norm=norm,
        estimate_norm=estimate_norm,
        error=jnp.sqrt(sum_of_squares(stacked.error**2)),
        cosine=jnp.sum(stacked.cosine * share * estimate_share),
        v=sum_of_squares(stacked.v),
        noise=sum_of_squares(stacked.noise),
        flops=stacked.flops.sum(),
        c=jnp.sum(stacked.c * stacked.flops) / stacked.flops.sum(),
    )


def _gradient_figures(exact: chex.ArrayTree, estimates: Iterable) -> dict[str, chex.Array]:
    """Figures for the gradient of all parameters; `estimates` are drawn one by one."""
    flat = _flat(exact)
    norm = _norm(flat)
    unit = safe_divide(flat, norm)

    @jax.jit
    def add(total: chex.Array, estimate: chex.Array, unit: chex.Array, norm: chex.Array) -> tuple:
        estimate = safe_divide(estimate, norm)
        off = estimate - unit
        square = jnp.sum(estimate**2)
        cosine = safe_divide(jnp.vdot(estimate, unit), jnp.sqrt(square))
        return total + off, (square, jnp.sum(off**2), cosine)

    total, draws = jnp.zeros_like(flat), []
    for estimate in estimates:
        total, draw = add(total, _flat(estimate), unit, norm)
        draws.append(draw)
    squares, offs, cosines = (jnp.stack(values) for values in zip(*draws, strict=True))
    return {
        "gradient_norm": norm,
        "estimate_norm": norm * jnp.sqrt(squares.mean()),
        "error": jnp.sqrt(offs.mean()),
        "cosine": cosines.mean(),
        "v": variance_of_draws(total, offs),
    }


def _flat(gradient: chex.ArrayTree) -> chex.Array:
    """All floating entries, float32."""
    leaves = floating_leaves(gradient)
    return jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in leaves])


def _norm(values: chex.Array) -> chex.Array:
    """The Euclidean norm of values of any size."""
    largest = jnp.max(jnp.abs(values))
    return largest * jnp.linalg.norm(safe_divide(values, largest))
