"""How good the approximate gradients of a model are on a batch, and whether they pay."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax._analysis.model_gradients import counted_flops
from mem_aop_jax._analysis.tables import markdown
from mem_aop_jax._core.measure import variance_of_draws
from mem_aop_jax._core.probe import Measured, Probe, is_memory
from mem_aop_jax._numerics import safe_divide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What `diagnostics` measured: a pytree of scalars, whose `str` is a table.

    The rule: an estimate that adds the relative variance v to the gradient, and whose step costs c
    of an exact one, pays if (1 + v) c < 1 where the batch's own noise dominates its gradient
    (`noise` near 1: it is like a batch smaller by 1 + v). Where the batch is so large that its
    noise hardly matters (`noise` near 0), v is nearly free, and it pays if c < 1.

    Attributes:
      layers: what was measured of each layer that took part in the loss, by the path of its memory.
      model: the same of the kernels of all these layers together. Its c is that of all of them;
        the energies, the ranks, `input_v` and `chosen` are means over the layers. Where gradients
        of inputs are approximate, what is wrong with them reaches all parameters below: then its
        norms, error, cosine and v are those of the gradient of all parameters, drawn as a whole.
      step_cost: FLOPs of the compiled gradient of the whole loss, relative to those of the exact
        one, as the compiler counts them: a refresh in every step, the body of a scan once. None
        where it counts nothing.
    """

    layers: dict[str, Measured]
    model: Measured
    step_cost: chex.Array | None

    def verdict(self, layer: str | None = None) -> chex.Array:
        """(1 + error^2) c of a layer, or of the model; below 1 the estimate pays.

        Of an unbiased estimate, error^2 is v. Of the paper's, rows that wait count as lost.
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
            of = self.model if name is None else self.layers[name]
            rule = float(self.verdict(name))
            figures = of.error, of.cosine, of.v, of.input_v, of.noise, of.c, rule
            lines.append(
                (
                    "**model**" if name is None else name,
                    *(f"{float(x):.3g}" for x in figures),
                    "yes" if rule < 1 else "if the batch is large" if of.c < 1 else "no",
                    *(f"{float(x):.2f}" for x in (of.inputs_inside, of.cotangents_inside)),
                    *(f"{float(x):.0f}" for x in (of.inputs_rank, of.cotangents_rank)),
                    f"{float(of.chosen):.2f}",
                )
            )
        return markdown(("layer", *head), lines)


def diagnostics(
    loss_fn: Callable,
    params: chex.ArrayTree,
    memory: chex.ArrayTree,
    *args,
    draws: int = 8,
    has_aux: bool = False,
    count_flops: bool = True,
) -> Diagnostics:
    """Measures the approximate gradients of a model on one batch, against the exact ones.

    Each layer's own gradient is measured where it is computed, with the exact gradient coming from
    above, in one backward pass through the exact model. That pass, `draws` approximate gradients
    and an eigendecomposition per layer, and compiling all that anew: for now and then, not for
    every step. Where gradients of inputs are approximate, `draws` backward passes more. Outside of
    `pmap` and `shard_map`.

    Args:
      loss_fn: `loss_fn(params, memory, *args)`, the one that is trained.
      params: as in training.
      memory: as in training: the memories of the layers to measure. A layer without one (such as
        `MemAOP(policy="priority")`) needs a `Probe` there: see `aop.linen.probes`.
      *args: the batch, the key and what else `loss_fn` takes; all are traced.
      draws: how many approximate gradients to draw, with keys split from each layer's own.
      has_aux: whether `loss_fn` returns `(loss, aux)`, as in `jax.grad`.
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
    memory = jax.tree.map(
        lambda m: m if isinstance(m, Probe) else Probe.of(m, draws, jnp.shape(m.uses)),
        memory,
        is_leaf=is_memory,
    )

    def each(change):
        return jax.tree.map(change, memory, is_leaf=is_memory)

    probes, exact_probes = (
        each(functools.partial(dataclasses.replace, draws=number)) for number in (draws, 0)
    )
    measured = jax.jit(jax.grad(loss_fn, argnums=1, has_aux=has_aux))(params, probes, *args)
    layers = _by_name(measured[0] if has_aux else measured)
    model = _together(list(layers.values()))
    if any(of.input_v > 0 for of in layers.values()):
        gradient = jax.grad(loss_fn, has_aux=has_aux, allow_int=True)
        of_params = jax.jit(lambda *args: gradient(*args)[0] if has_aux else gradient(*args))
        exact = of_params(params, exact_probes, *args)

        def numbered(i, probe):
            draw = jnp.full(jnp.shape(probe.uses), i, jnp.int32)
            return dataclasses.replace(probe, draws=0, draw=draw)

        estimates = (
            of_params(params, each(functools.partial(numbered, i)), *args) for i in range(draws)
        )
        model = model._replace(**_as_a_whole(exact, estimates))

    step_cost = None
    if count_flops:
        gradient = jax.jit(jax.grad(loss_fn, argnums=(0, 1), has_aux=has_aux, allow_int=True))
        flops = []
        for given in (each(lambda probe: probe.memory), exact_probes):
            flops.append(counted_flops(gradient, params, given, *args))
        if min(flops) > 0:
            step_cost = jnp.asarray(flops[0] / flops[1], jnp.float32)
    return Diagnostics(layers, model, step_cost)


def _by_name(measured):
    """Of each layer that took part in the loss."""
    found = jax.tree_util.tree_leaves_with_path(measured, is_leaf=is_memory)
    layers = {}
    for path, probe in found:
        if path and isinstance(path[-1], jax.tree_util.GetAttrKey):
            path = path[:-1]  # the value of an NNX variable
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = f"/{name}".removesuffix("/memory").removeprefix("/") or "layer"
        for index in np.ndindex(probe.uses.shape):  # of a stack of layers, each
            number = f"[{','.join(map(str, index))}]" if index else ""
            layers[name + number] = jax.tree.map(lambda a, i=index: a[i], probe.measured)
    for name, of in layers.items():
        if of.uses not in (0, 1):
            raise ValueError(
                f"diagnostics: the memory of {name} was used {of.uses} times. Each use in a step "
                "needs a memory of its own (in nn.remat or nn.jit, call a layer once)."
            )
    layers = {name: of for name, of in layers.items() if of.uses}
    if not layers:
        raise ValueError(
            f"diagnostics: of {len(found)} memories none took part in the loss. Pass what the "
            "layers are trained with (aop.get_memory(opt_state), variables[aop.linen.COLLECTION], "
            "the aop.nnx.Memory state); for Linen layers without a memory, "
            "aop.linen.probes(model, memory, rngs, example_input)."
        )
    return layers


def _together(layers):
    """Of the kernels of all layers: their draws are independent, so squares add up."""
    of = jax.tree.map(lambda *values: jnp.stack(values), *layers)
    norm = _norm(of.gradient_norm)
    share = safe_divide(of.gradient_norm, norm)
    estimate_norm = _norm(of.estimate_norm)
    estimate_share = safe_divide(of.estimate_norm, estimate_norm)

    def of_squares(values):
        return jnp.sum(values * share**2)

    means = jax.tree.map(jnp.mean, of)
    return means._replace(
        gradient_norm=norm,
        estimate_norm=estimate_norm,
        error=jnp.sqrt(of_squares(of.error**2)),
        cosine=jnp.sum(of.cosine * share * estimate_share),
        v=of_squares(of.v),
        noise=of_squares(of.noise),
        flops=of.flops.sum(),
        c=jnp.sum(of.c * of.flops) / of.flops.sum(),
    )


def _as_a_whole(exact, estimates):
    """Of the gradient of all parameters; `estimates` are trees like `exact`, drawn anew."""
    exact = _flat(exact)
    norm = _norm(exact)
    unit = safe_divide(exact, norm)

    @jax.jit
    def add(total, estimate, unit, norm):
        estimate = safe_divide(estimate, norm)
        off = estimate - unit
        squares = jnp.sum(estimate**2), jnp.sum(off**2)
        return total + off, (*squares, safe_divide(jnp.vdot(estimate, unit), jnp.sqrt(squares[0])))

    total, found = jnp.zeros_like(exact), []
    for estimate in estimates:
        total, of_draw = add(total, _flat(estimate), unit, norm)
        found.append(of_draw)
    squares, offs, cosines = (jnp.stack(values) for values in zip(*found, strict=True))
    return {
        "gradient_norm": norm,
        "estimate_norm": norm * jnp.sqrt(squares.mean()),
        "error": jnp.sqrt(offs.mean()),
        "cosine": cosines.mean(),
        "v": variance_of_draws(total, offs),
    }


def _flat(gradient):
    """All floating entries, float32."""
    leaves = [
        leaf for leaf in jax.tree.leaves(gradient) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in leaves])


def _norm(values):
    """Euclidean, of values of any size."""
    largest = jnp.max(jnp.abs(values))
    return largest * jnp.linalg.norm(safe_divide(values, largest))
