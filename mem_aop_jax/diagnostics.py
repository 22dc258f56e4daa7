"""How good the approximate gradients of a model are on a batch, and whether they pay."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax.memory import Measured, Probe, is_memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What `diagnostics` measured: a pytree of scalars, whose `str` is a table.

    The rule: an estimate that adds the relative variance v to the gradient, and whose step costs c
    of an exact one, pays if (1 + v) c < 1 where the batch's own noise dominates its gradient
    (`noise` near 1: it is like a batch smaller by 1 + v). Where the batch is so large that its
    noise hardly matters (`noise` near 0), v is nearly free, and it pays if c < 1.

    Attributes:
      layers: what was measured of each layer, by the path of its memory.
      model: the same of the kernels of all these layers together, of which `inputs_inside` and what
        follows are means over the layers; its c is that of `step_cost` if there is one.
      step_cost: FLOPs of the compiled gradient of the loss, relative to those of the exact one;
        None where the compiler counts none.
    """

    layers: dict[str, Measured]
    model: Measured
    step_cost: chex.Array | None

    def verdict(self, layer: str | None = None) -> chex.Array:
        """(1 + v) c of a layer, or of the model; below 1 the estimate pays.

        v here is the square of `error`, so that rows which only wait in a memory count as lost.
        """
        measured = self.model if layer is None else self.layers[layer]
        return (1 + measured.error**2) * measured.c

    def __str__(self) -> str:
        head = (
            *("error", "cosine", "v", "noise", "c", "(1+v)c", "pays"),
            *("X inside", "G inside", "X rank 90%", "G rank 90%", "chosen"),
        )
        lines = [("layer", *head), ("---", *["---:"] * len(head))]
        for name in (*self.layers, None):
            of = self.model if name is None else self.layers[name]
            rule = float(self.verdict(name))
            lines.append(
                (
                    "**model**" if name is None else name,
                    *(f"{float(x):.3g}" for x in (of.error, of.cosine, of.v, of.noise, of.c, rule)),
                    "yes" if rule < 1 else "if the batch is large" if of.c < 1 else "no",
                    *(f"{float(x):.2f}" for x in (of.inputs_inside, of.cotangents_inside)),
                    *(f"{float(x):.0f}" for x in (of.inputs_rank, of.cotangents_rank)),
                    f"{float(of.chosen):.2f}",
                )
            )
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def diagnostics(
    loss_fn: Callable,
    params: chex.ArrayTree,
    memory: chex.ArrayTree,
    *args,
    draws: int = 8,
    has_aux: bool = False,
) -> Diagnostics:
    """Measures the approximate gradients of a model on one batch, against the exact ones.

    Each layer's own gradient is measured where it is computed, with the exact gradient coming from
    above, in one backward pass through the exact model. Costs that pass, `draws` approximate
    gradients and an eigendecomposition per layer, and the first time with a `loss_fn` three
    compilations: for now and then, not for every step.

    Args:
      loss_fn: `loss_fn(params, memory, *args)`, the one that is trained.
      params: as in training.
      memory: as in training: the memories of the layers to measure. A layer without one (such as
        `MemAOP(policy="priority")`) needs a `Probe` there: see `aop.linen.probes`.
      *args: the batch, the key and what else `loss_fn` takes.
      draws: how many approximate gradients to draw, with keys split from each layer's own.
      has_aux: whether `loss_fn` returns `(loss, aux)`, as in `jax.grad`.

    Raises:
      ValueError: no memory; draws below 1.

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
    if draws < 1:
        raise ValueError(f"diagnostics: got draws={draws}; it must be at least 1.")

    def of(memory):
        return memory.memory if isinstance(memory, Probe) else memory

    def probes(draws):
        def probe(memory):
            stack = jnp.shape(memory.uses)
            return Probe.of(of(memory), draws, stack)

        return jax.tree.map(probe, memory, is_leaf=is_memory)

    measured = _gradient(loss_fn, (1,), has_aux)(params, probes(draws), *args)
    (measured,) = measured[0] if has_aux else measured
    found = jax.tree_util.tree_leaves_with_path(measured, is_leaf=is_memory)
    if not found:
        raise ValueError(
            "diagnostics: memory has no memory of a layer in it. Pass what the layers are trained "
            "with (aop.get_memory(opt_state), variables[aop.linen.COLLECTION]); for layers that "
            "have none, aop.linen.probes(model, rngs, example_input)."
        )
    layers = {}
    for path, probe in found:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = name.removesuffix("/value").removesuffix("/memory") or "layer"  # NNX has a value
        for index in np.ndindex(probe.uses.shape):  # of a stack of layers, each
            number = f"[{','.join(map(str, index))}]" if index else ""
            layers[name + number] = jax.tree.map(lambda a, i=index: a[i], probe.measured)

    flops = [
        _flops(_gradient(loss_fn, (0, 1), has_aux), params, given, *args)
        for given in (jax.tree.map(of, memory, is_leaf=is_memory), probes(0))
    ]
    step_cost = None
    if all(flops):
        left_out = sum(float(measured.left_out) for measured in layers.values())
        step_cost = jnp.asarray((flops[0] - left_out) / flops[1], jnp.float32)
    return Diagnostics(layers, _together(list(layers.values()), step_cost), step_cost)


def _together(layers, step_cost):
    """Of the kernels of all layers: their draws are independent, so squares add up."""
    of = jax.tree.map(lambda *values: jnp.stack(values), *layers)
    norm = jnp.linalg.norm(of.gradient_norm)
    share = of.gradient_norm / jnp.where(norm > 0, norm, 1)

    def of_squares(values):
        return jnp.sum(values * share**2)

    estimate_norm = jnp.linalg.norm(of.estimate_norm)
    dot = jnp.sum(of.cosine * of.gradient_norm * of.estimate_norm)
    size = norm * estimate_norm
    means = jax.tree.map(jnp.mean, of)
    return means._replace(
        gradient_norm=norm,
        estimate_norm=estimate_norm,
        error=jnp.sqrt(of_squares(of.error**2)),
        cosine=dot / jnp.where(size > 0, size, 1),
        v=of_squares(of.v),
        noise=of_squares(of.noise),
        c=means.c if step_cost is None else step_cost,
        left_out=jnp.sum(of.left_out),
    )


@functools.lru_cache(maxsize=16)
def _gradient(loss_fn, argnums, has_aux):
    """Kept, so that it compiles once."""
    return jax.jit(jax.grad(loss_fn, argnums=argnums, has_aux=has_aux))


def _flops(gradient, *args):
    """FLOPs of a compiled function, for one device; 0 where the compiler counts none."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda *args: args, *args))
    return _flops_for_shapes(gradient, structure, tuple(leaves))


@functools.lru_cache(maxsize=16)
def _flops_for_shapes(gradient, structure, shapes):
    compiled = gradient.lower(*structure.unflatten(shapes)).compile()
    return max((compiled.cost_analysis() or {}).get("flops", 0.0), 0.0)
