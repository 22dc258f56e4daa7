"""Where in a model a budget of FLOPs does least harm: rows and ranks for each layer.

For a few batches it is measured what is left of the rows outside of 0, 1, ... directions. That
gives the variance of any choice for a layer: rows m drawn with the probabilities
p[m] = min(1, s[m] / t), of which the sum is k, add

    sum over m of (1 / p[m] - 1) ||term m||^2

with s[m] = ||Xr[m]|| ||Gr[m]|| = ||term m|| for the kernel's gradient, and for the inputs'
s[m] = ||Gr[m]||, ||term m|| = ||Gr[m] W^T||. What is wrong with an input gradient goes through
the layers below, where it counts for more or less: by what factor is measured with draws of it, for
one layer at a time. (The backward pass is linear in the cotangents, so that these variances add up;
that a layer below draws from cotangents which are wrong already is of second order.)
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax import linen
from mem_aop_jax._analysis import model_gradients
from mem_aop_jax._analysis.tables import markdown
from mem_aop_jax._core.config import InputGrad, MemAOP
from mem_aop_jax._core.flops import exact_flops, relative_cost
from mem_aop_jax._core.probe import Norms, Probe, is_memory
from mem_aop_jax._models import Rules

RATIOS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the rows
RANKS = (0, 4, 8, 16, 24, 32, 48, 64)  # of each side, up to a quarter of its features
INPUT_RATIOS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
FIRST_PASSES = 2  # over the first batch, so that the directions follow the rows


class Choice(NamedTuple):
    """What `allocate` chose for a layer.

    Attributes:
      path: of the layer.
      config: for it; None is exact.
      v: what its gradients add to the variance of the gradient of all parameters, relative to the
        square of that.
      c: FLOPs of its step, relative to those of the exact layer.
    """

    path: str
    config: MemAOP | None
    v: float
    c: float


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What `allocate` returns; its `str` is a table.

    Attributes:
      layers: what was chosen, for each layer.
      v: predicted variance of the gradient of all parameters, relative to its square.
      c: FLOPs of all these layers' steps, relative to those of exact ones.
      spent: FLOPs of the measurement, as the compiler counts them.
    """

    layers: tuple[Choice, ...]
    v: float
    c: float
    spent: float

    @property
    def rules(self) -> Rules:
        """For `aop.linen.wrap`."""
        return tuple((re.escape(choice.path), choice.config) for choice in self.layers)

    def verdict(self) -> float:
        """(1 + v) c, below 1 where the estimate pays (see `Diagnostics`)."""
        return (1 + self.v) * self.c

    def __str__(self) -> str:
        rows = [(path, *_shown(config), v, c) for path, config, v, c in self.layers]
        verdict = f"(1 + v) c = {self.verdict():.3f}"
        rows.append(("**model**", verdict, "", "", "", self.v, self.c))
        return markdown(
            ("layer", "rows", "rank", "rows for dX", "rank for dX", "v", "c"),
            [(*cells, f"{v:.3g}", f"{c:.3f}") for *cells, v, c in rows],
        )


def allocate(
    model: nn.Module,
    config: MemAOP,
    example_input: chex.ArrayTree,
    loss: Callable,
    budget: float | None = None,
    *,
    params: chex.ArrayTree,
    batches: Sequence[chex.ArrayTree],
    key: chex.PRNGKey,
    layers: str = ".*",
    draws: int = 4,
    metric: chex.ArrayTree | None = None,
) -> Allocation:
    """Rows and ranks for each dense layer of a model, with least variance for a budget of FLOPs.

    A layer for which exact is the better buy stays exact. What is best changes as training goes on:
    spectra get flatter; and before it, a layer whose kernel is zero hides those below.

    Args:
      model: a Linen model, not wrapped.
      config: what the layers have in common: the policy, "priority", `groups` and `refresh`. Unless
        its memory is "subspace" none gets one, and with `input_grad=None` gradients of inputs stay
        exact; else both are chosen for each layer, as rows and ranks are, whatever they are here.
      example_input: what `model.init` takes, of the training size, arrays or
        `jax.ShapeDtypeStruct`s; a tuple for several arguments.
      loss: `loss(model, variables, batch, key)`: of a model that it is given, the scalar that is
        trained. For instance `model.apply(variables, batch, rngs={aop.linen.RNG: key}).mean()`.
        `variables` are "params" and the memories; other collections are for it to add.
      budget: FLOPs of the layers' steps, relative to those of exact ones, in (0, 1]; None finds the
        one of the smallest (1 + v) c.
      params: the parameters, after as much training as there was.
      batches: two or more, of the size of the example input.
      key: for the draws.
      layers: regular expression on the whole path of a layer; the others stay exact, and are no
        part of c.
      draws: for each layer, of the gradient of its inputs.
      metric: a tree like `params`: what the square of each entry of the gradient counts for, in v.
        None counts all alike, as SGD does. Adam divides by the root of its second moments, so that
        small gradients count as much as large ones:
        `jax.tree.map(lambda nu: 1 / (jnp.sqrt(nu) + 1e-8), optax.tree_utils.tree_get(opt_state,
        "nu"))`.

    Returns:
      Rules for `aop.linen.wrap`, and a table.

    Raises:
      TypeError: a configuration that is none.
      ValueError: another policy, fewer than two batches or one of another size, a budget outside of
        (0, 1], or one that no choice meets; no layer that matches, or one that is called with
        different sizes; a gradient that is zero or not finite.
    """
    _check(config, budget, batches)
    args = model_gradients.arguments(example_input)
    shared = {"policy": config.policy, "groups": config.groups}
    plain = linen.wrap(model, [(layers, MemAOP(ratio=0.5, **shared))])
    sizes = _sizes(linen.layers(plain, key, *args))

    def reference(in_features, out_features):
        of_inputs = config.input_grad and InputGrad(INPUT_RATIOS[0], min(32, out_features // 4))
        # one direction at least: a `Norms` probe has both sides
        rank = tuple(max(1, *_ranks(features)) for features in (in_features, out_features))
        options = {"memory": "subspace", "rank": rank, "input_grad": of_inputs}
        return MemAOP(ratio=0.5, **options, **shared)

    configs = {path: reference(*of_layer[1:]) for path, of_layer in sizes.items()}
    wrapped = model_gradients.wrapped(model, configs)
    measurement = _Measurement(loss, wrapped, params, batches, key, metric)
    norms, memory, exact = measurement.norms(model_gradients.first_memory(wrapped, *args), sizes)
    weights, harm = dict.fromkeys(sizes, 1.0), dict.fromkeys(sizes, 0.0)
    if metric is not None:
        sampled = model_gradients.wrapped(
            model, {path: _sampled(own) for path, own in configs.items()}
        )
        lent = model_gradients.first_of(model_gradients.memory_shapes(sampled, *args), memory)
        weights = measurement.weights(sampled, lent, exact, sizes)
    if config.input_grad:
        harm = measurement.harm(memory, norms, configs, sizes, draws)

    options = {
        path: _options(config, shared, sizes[path], norms[path], weights[path], harm[path])
        for path in sizes
    }
    return Allocation(*_best(options, budget), measurement.spent)


def _sampled(config):
    """A typical choice, of which more is wrong than of the one that it is taken from."""
    rank = tuple(min(rank, 8) for rank in config.rank)
    return dataclasses.replace(config, ratio=0.25, rank=rank, input_grad=None)


def _check(config, budget, batches):
    if not isinstance(config, MemAOP):
        raise TypeError(f"allocate: config is of type {type(config).__name__}, not aop.MemAOP.")
    if config.policy != "priority":
        raise ValueError(
            f"allocate: got policy={config.policy!r}; what is known of the variance is that of "
            "policy='priority'."
        )
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(
            f"allocate: got budget={budget}; it is a share of the exact steps' FLOPs, in (0, 1], "
            "or None."
        )
    model_gradients.check_batches("allocate", batches)


def _sizes(layers):
    """Rows, in_features and out_features by path."""
    sizes = {}
    for layer in layers:
        if sizes.setdefault(layer.path, layer[1:4]) != layer[1:4]:
            raise ValueError(
                f"allocate: {layer.path} is called with {sizes[layer.path]} and {layer[1:4]} as "
                "(rows, in_features, out_features); one rule is for all calls of a layer. Leave it "
                "out with layers=."
            )
    return sizes


# ---- what is measured


class _Rows(NamedTuple):
    """Of a layer and a batch.

    Attributes:
      norms: of all its calls, and of each member where it is a stack.
      stacked: whether it is one.
      gradient_norm: of the gradient of all parameters.
    """

    norms: list[Norms]
    stacked: bool
    gradient_norm: float


class _Measurement:
    """Passes through a model in which all layers that may be approximate have probes."""

    def __init__(self, loss, model, params, batches, key, metric):
        self.batches, self.key, self.metric, self.spent = batches, key, metric, 0.0
        self._backward, self._model, self._params = model_gradients.backward(loss), model, params

    def _pass(self, memory, batch, key, model=None):
        found = self._backward(model or self._model, self._params, memory, batch, key)
        self.spent += found.flops
        return found

    def norms(self, memory, sizes):
        """Of all batches but the first for each path the `_Rows`; the memory that the last of them
        was measured with, which does not know it, and the exact gradient there.
        """
        by_path = {path: [] for path in sizes}
        order = [0] * FIRST_PASSES + [*range(1, len(self.batches))]
        for i, batch in enumerate(order):
            probes = model_gradients.each_memory(
                memory, functools.partial(model_gradients.with_norms, sizes)
            )
            found = self._pass(probes, self.batches[batch], self.key)
            before, memory = memory, model_gradients.next_memory(found.memory)
            if i < FIRST_PASSES:
                continue
            norm = model_gradients.finite_norm("allocate", batch, found.gradient, self.metric)
            for path, calls in _by_path(found.memory).items():
                of_calls = [jax.tree.map(np.asarray, probe.measured) for probe in calls]
                members = [member for of in of_calls for member in _members(of)]
                by_path[path].append(_Rows(members, of_calls[0].uses.ndim > 0, norm))
        return by_path, before, found.gradient

    def weights(self, sampled, memory, exact, paths):
        """Of each path, what the metric makes of what is wrong with the kernel's gradient.

        Found from one gradient of the model `sampled` on the last batch, and the exact one.
        """
        estimate = self._pass(memory, self.batches[-1], self.key, sampled).gradient
        weights = {}
        for path in paths:
            pair = [_kernel(path, tree) for tree in (estimate, exact)]
            plain = model_gradients.square(*pair)
            weights[path] = (
                model_gradients.square(*pair, _kernel(path, self.metric)) / plain if plain else 0.0
            )
        return weights

    def harm(self, memory, norms, configs, sizes, draws):
        """How much of an input gradient's variance comes out as variance of the whole gradient."""
        batch = self.batches[-1]

        def noise(path, name, memory):
            value = jnp.full(jnp.shape(memory.uses), float(name == path), jnp.float32)
            return dataclasses.replace(Probe.of(memory, 0, jnp.shape(memory.uses)), noise=value)

        def gradient(path, key):
            probes = model_gradients.each_memory(memory, functools.partial(noise, path))
            return self._pass(probes, batch, key).gradient

        added = {}
        for path, config in configs.items():
            drawn, groups = config.input_rows(sizes[path][0]), config.groups
            added[path] = _input_variance(norms[path][-1], config.input_grad.rank, drawn, groups)
        harm = {path: 0.0 for path in configs}
        for key in jax.random.split(self.key, draws):
            exact = gradient(None, key)
            for path, variance in added.items():
                if variance > 0:
                    harm[path] += (
                        model_gradients.square(gradient(path, key), exact, self.metric)
                        / variance
                        / draws
                    )
        return harm


def _kernel(path, params):
    """That of a layer."""
    for name in path.split("/"):
        params = params[name]
    return nn.unbox(params["kernel"])


def _by_path(tree, path=()):
    """Of each path the memories of all calls."""
    found = {}
    for name, node in tree.items():
        if is_memory(node):
            found.setdefault("/".join(path), []).append(node)
        else:
            found |= _by_path(node, (*path, name))
    return found


def _members(norms):
    """Of a stack of layers, each."""
    stack = norms.uses.shape
    flat = [a.reshape(-1, *a.shape[len(stack) :]) for a in norms]
    return [Norms(*member) for member in zip(*flat, strict=True)]


# ---- what is chosen


class _Options(NamedTuple):
    """The choices for a layer, exact first: configurations, what they add to v, their FLOPs."""

    configs: list[MemAOP | None]
    v: np.ndarray
    flops: np.ndarray


def _options(config, shared, sizes, norms, weight, harm):
    rows, in_features, out_features = sizes
    of_all = exact_flops(*sizes)
    asked_for = any(member.asked_for for member in norms[-1].norms)
    left_out = 0 if asked_for else of_all / 3
    members = len(norms[-1].norms)
    configs, v, flops = [None], [0.0], [of_all - left_out]

    def mean(variance, *args):
        return np.mean([variance(of, *args) / of.gradient_norm**2 for of in norms])

    of_kernel = functools.cache(functools.partial(mean, _kernel_variance))
    of_inputs = functools.cache(functools.partial(mean, _input_variance))
    for candidate in _candidates(config, shared, asked_for, *sizes):
        if norms[-1].stacked and candidate.memory_kind is None:
            continue  # in `wrap`, the key of a stacked layer comes with its memory
        ranks = candidate.ranks(in_features, out_features) if candidate.memory_kind else (0, 0)
        groups = candidate.groups
        added = weight * of_kernel(*ranks, candidate.selected_rows(rows), groups)
        if candidate.input_grad:
            drawn = candidate.input_rows(rows)
            added += harm * of_inputs(candidate.input_grad.rank, drawn, groups)
        configs.append(candidate)
        v.append(added)
        flops.append(of_all * relative_cost(candidate, *sizes) - left_out)
    return _Options(configs, np.array(v), np.array(flops) * members)


def _candidates(config, shared, asked_for, rows, in_features, out_features):
    """Configurations that differ for a layer of these sizes."""
    with_inputs = asked_for and config.input_grad is not None
    of_x, of_g = map(_ranks, (in_features, out_features))
    memories = [{}]
    if config.memory_kind is not None:
        kept = {"memory": "subspace", "refresh": config.refresh}
        memories += [kept | {"rank": (rank, other)} for rank in of_x[1:] for other in of_g]
    for ratio in RATIOS:
        if shared["groups"] > ratio * rows:
            continue  # one row of each group at least
        for memory in memories:
            yield MemAOP(ratio=ratio, **memory, **shared)
            if not with_inputs:
                continue
            for of_inputs in INPUT_RATIOS:
                for rank in of_g if memory else (0,):
                    wanted = InputGrad(of_inputs, rank)
                    yield MemAOP(ratio=ratio, input_grad=wanted, **memory, **shared)


def _ranks(features):
    return [rank for rank in RANKS if 4 * rank <= features]


def _kernel_variance(of, rank, other_rank, k, groups):
    norms = (n.inputs[:, rank] * n.cotangents[:, other_rank] for n in of.norms)
    return sum(_variance(s, s, k, groups) for s in norms)


def _input_variance(of, rank, k, groups):
    pairs = ((n.cotangents[:, rank], n.of_inputs[:, rank]) for n in of.norms)
    return sum(_variance(scores, sizes, k, groups) for scores, sizes in pairs)


def _variance(scores, sizes, k, groups=1):
    """Of a sum of terms of these sizes, of which k are drawn in proportion to the scores.

    In each group an equal share of them.
    """
    if groups > 1:
        parts = zip(scores.reshape(groups, -1), sizes.reshape(groups, -1), strict=True)
        return sum(_variance(*part, k // groups) for part in parts)
    order = np.argsort(-scores)
    s, sizes = (np.asarray(a, np.float64)[order] for a in (scores, sizes))
    left = np.cumsum(s[::-1])[::-1]  # of each row on
    if k >= len(s) or not left[0]:
        return 0.0
    thresholds = left[:k] / (k - np.arange(k))  # where that many rows are drawn for certain
    certain = np.argmax(s[:k] <= thresholds)
    s, sizes = s[certain:], sizes[certain:]
    drawn = s > 0
    return np.sum((thresholds[certain] / s[drawn] - 1) * sizes[drawn] ** 2)


def _best(options, budget):
    """The choices of least v that meet the budget, or of least (1 + v) c; their v and c.

    Of those that are best at some price of FLOPs, the same in all layers.
    """
    exact = sum(of.flops[0] for of in options.values())

    def chosen(price):
        """For each layer the option of least v + price * c."""
        return {
            path: int(np.argmin(of.v + price * of.flops / exact)) for path, of in options.items()
        }

    def total(choice):
        v, flops = (
            sum(getattr(options[path], name)[i] for path, i in choice.items())
            for name in ("v", "flops")
        )
        return v, flops / exact

    choices = [chosen(price) for price in (0, *np.geomspace(1e-6, 1e6, 1200))]
    totals = [total(choice) for choice in choices]
    if budget is None:
        best = min(range(len(choices)), key=lambda i: (1 + totals[i][0]) * totals[i][1])
    else:
        meets = [i for i, (_, c) in enumerate(totals) if c <= budget]
        if not meets:
            raise ValueError(
                f"allocate: got budget={budget}; the cheapest choice for these layers costs "
                f"{min(c for _, c in totals):.3f} of exact steps. Give more."
            )
        best = min(meets, key=lambda i: totals[i][0])
    layers = tuple(
        Choice(
            path,
            of.configs[choices[best][path]],
            float(of.v[choices[best][path]]),
            float(of.flops[choices[best][path]] / of.flops[0]),
        )
        for path, of in options.items()
    )
    return layers, *map(float, totals[best])


def _shown(config):
    if config is None:
        return "exact", "", "exact", ""
    rank = "{} + {}".format(*config.rank) if config.memory_kind else ""
    if config.input_grad is None:
        return f"{config.ratio:.3g}", rank, "exact", ""
    of_inputs = config.input_grad
    return f"{config.ratio:.3g}", rank, f"{of_inputs.ratio:.3g}", str(of_inputs.rank)
