"""Where in a model a budget of FLOPs does least harm: rows and ranks for each layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import numpy as np

from mem_aop_jax import linen
from mem_aop_jax._analysis.layer_variance import LayerVariance, Measurement
from mem_aop_jax._analysis.subject import ExampleInput, Subject, as_args, check_batches
from mem_aop_jax._approximate.approximated import Approximated
from mem_aop_jax._approximate.program import Site
from mem_aop_jax._core.config import InputGrad, MemAOP
from mem_aop_jax._core.flops import exact_flops, relative_cost
from mem_aop_jax._models import Layer, Rules, rules_for
from mem_aop_jax._tables import markdown

RATIOS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the rows
RANKS = (0, 4, 8, 16, 24, 32, 48, 64)  # of each side, up to a quarter of its features
INPUT_RATIOS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)


class Choice(NamedTuple):
    """The choice of `allocate` for a layer.

    Attributes:
      path: of the layer.
      config: of the layer; None is exact.
      v: variance that the layer adds to the gradient of all parameters, relative to the square of
        that gradient.
      c: FLOPs of the layer's step, relative to those of the exact layer.
    """

    path: str
    config: MemAOP | None
    v: float
    c: float


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The choices of `allocate` for all layers; its `str` is a table.

    Attributes:
      layers: one choice for each layer.
      v: predicted variance of the gradient of all parameters, relative to its square.
      c: FLOPs of the steps of these layers, relative to those of exact layers.
      spent: FLOPs of the measurement, as the compiler counts them.
    """

    layers: tuple[Choice, ...]
    v: float
    c: float
    spent: float

    @property
    def rules(self) -> Rules:
        """For `aop.approximate` or `aop.linen.wrap`."""
        return rules_for({choice.path: choice.config for choice in self.layers})

    def verdict(self) -> float:
        """(1 + v) c, below 1 where the estimate pays (see `Diagnostics`)."""
        return (1 + self.v) * self.c

    def __str__(self) -> str:
        rows = [(path, *_config_cells(config), v, c) for path, config, v, c in self.layers]
        verdict = f"(1 + v) c = {self.verdict():.3f}"
        rows.append(("**model**", verdict, "", "", "", self.v, self.c))
        return markdown(
            ("layer", "rows", "rank", "rows for dX", "rank for dX", "v", "c"),
            [(*cells, f"{v:.3g}", f"{c:.3f}") for *cells, v, c in rows],
        )


@functools.singledispatch
def allocate(
    approx: Approximated | nn.Module,
    params: chex.ArrayTree,
    batches: Sequence[tuple],
    key: chex.PRNGKey,
    *,
    budget: float | None = None,
    draws: int = 4,
    metric: chex.ArrayTree | None = None,
) -> Allocation:
    """Rows and ranks for each contraction of a loss, with least variance for a budget of FLOPs.

    A contraction stays exact where that is the better buy. The best choice changes during training,
    since spectra get flatter. Before training, a layer whose kernel is zero hides the layers below
    it.

    For a Linen model: `allocate(model, config, example_input, loss, budget, *, params, batches,
    key, layers=".*", draws=4, metric=None)`. There `model` is not wrapped, and has `config` for the
    layers whose whole path the regular expression `layers` matches; `loss(model, variables, batch,
    key)` returns the scalar that is trained, for the model that it gets, for instance
    `model.apply(variables, batch, rngs={aop.linen.RNG: key}).mean()`, where `variables` are
    "params" and the memories, and the loss adds other collections itself; `example_input` are the
    inputs of `model.init`, of the training size, as in `aop.plan`; batches are whatever the loss
    takes.

    Args:
      approx: `aop.approximate` of the loss, or of a pair of the loss and something else. Its
        configurations say what each contraction may have: the policy, "priority", `groups` and
        `refresh`. With memory="subspace" it gets ranks of its own, and with an `input_grad` rows
        and a rank for the gradient of its inputs, whatever their values are here; else it has no
        memory, and the gradient of its inputs stays exact. What `approx` leaves exact stays exact,
        and c leaves it out.
      params: the current parameters.
      batches: two or more, of one size: tuples of the arguments after the parameters.
      key: for the draws.
      budget: FLOPs of the layers' steps, relative to those of exact layers, in (0, 1]; None takes
        the budget with the smallest (1 + v) c.
      draws: the number of draws of each layer's input gradient.
      metric: a tree like `params`: factors on the squared entries of the gradient in v. None counts
        all entries alike, as SGD does. Adam divides by the root of its second moments, so that
        small gradients count as much as large ones:
        `jax.tree.map(lambda nu: 1 / (jnp.sqrt(nu) + 1e-8), optax.tree_utils.tree_get(opt_state,
        "nu"))`.

    Returns:
      Rules for `aop.approximate` or `aop.linen.wrap`, and a table.

    Raises:
      TypeError: neither a function of `aop.approximate` nor a Linen model; a batch that is no
        tuple; `config` is no `MemAOP`.
      ValueError: another policy, fewer than two batches or one of another size, a budget outside of
        (0, 1] or below the cheapest choice; no layer that matches, or a layer that is called with
        different sizes; a gradient that is zero or not finite.
    """
    subject = Subject.of_function("allocate", approx)
    return _allocate(subject, params, batches, key, budget, draws, metric)


@allocate.register(nn.Module)
def _allocate_model(
    model: nn.Module,
    config: MemAOP,
    example_input: ExampleInput,
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
    """The same for a Linen model."""
    if not isinstance(config, MemAOP):
        raise TypeError(f"allocate: config is of type {type(config).__name__}, not aop.MemAOP.")
    rules = ((layers, dataclasses.replace(config, k=None, ratio=0.5)),)
    subject = Subject.of_model("allocate", model, loss, rules)
    example = as_args("allocate", example_input)
    listed = linen.layers(linen.wrap(model, rules), jax.random.key(0), *example)
    rows = {path: layer.rows for path, layer in _layers_by_path(listed).items()}
    return _allocate(subject, params, batches, key, budget, draws, metric, rows)


def _allocate(
    subject: Subject,
    params: chex.ArrayTree,
    batches: Sequence[Any],
    key: chex.PRNGKey,
    budget: float | None,
    draws: int,
    metric: chex.ArrayTree | None,
    rows: Mapping[str, int] | None = None,
) -> Allocation:
    """`rows` are those of an example input, by the layers' paths, which batches must have."""
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(
            f"allocate: got budget={budget}; it is a share of the exact steps' FLOPs, in (0, 1], "
            "or None."
        )
    check_batches("allocate", subject, batches)
    sites = subject.sites(params, batches[0], key)
    layers = _layers_by_path([site.layer for site in sites])
    if rows is not None:
        _check_rows(layers, rows)
    configs = {site.layer.path: _checked_config(site) for site in sites}
    largest = {path: _largest(configs[path], layer) for path, layer in layers.items()}
    measurement = Measurement(subject, params, batches, key, metric)
    variances = measurement.layer_variances(largest, draws)
    options = {
        path: _options(configs[path], layer, variances[path]) for path, layer in layers.items()
    }
    return Allocation(*_best(options, budget), measurement.spent)


def _check_rows(layers: Mapping[str, Layer], rows: Mapping[str, int]) -> None:
    for path, layer in reversed(list(layers.items())):
        if rows.get(path) != layer.rows:
            raise ValueError(
                f"allocate: {path}: a batch with {layer.rows} rows, where the example input has "
                f"{rows.get(path, 'no')}."
            )


def _checked_config(site: Site) -> MemAOP:
    assert site.config is not None, "it is approximate"
    if site.config.policy != "priority":
        raise ValueError(
            f"allocate: got policy={site.config.policy!r}; what is known of the variance is that "
            "of policy='priority'."
        )
    return site.config


def _layers_by_path(layers: Sequence[Layer]) -> dict[str, Layer]:
    """The first call of each layer."""
    by_path: dict[str, Layer] = {}
    for layer in layers:
        sizes = by_path.setdefault(layer.path, layer).sizes
        if sizes != layer.sizes:
            raise ValueError(
                f"allocate: {layer.path} is called with {sizes} and {layer.sizes} as (rows, "
                "in_features, out_features); one rule is for all calls of a layer. Leave it out "
                "with layers=."
            )
    return by_path


# ---- the choices for a layer


class _Options(NamedTuple):
    """The choices for a layer, exact first: configurations, what they add to v, their FLOPs."""

    configs: list[MemAOP | None]
    v: np.ndarray
    flops: np.ndarray


def _options(config: MemAOP, layer: Layer, variance: LayerVariance) -> _Options:
    exact, last = exact_flops(*layer.sizes), variance.batches[-1]
    asked_for = any(call.asked_for for call in last.calls)
    not_asked = 0 if asked_for else exact / 3  # for the gradient of the inputs
    candidates = _candidates(config, asked_for, layer.sizes)
    kernel_rows = sorted({c.selected_rows(layer.rows) for c in candidates})
    input_rows = sorted({c.input_rows(layer.rows) for c in candidates})

    @functools.cache
    def kernel_terms(ranks: tuple[int, int]) -> dict[int, float]:  # by the number of rows
        terms = variance.kernel_term(ranks, kernel_rows, config.groups)
        return dict(zip(kernel_rows, terms, strict=True))

    @functools.cache
    def input_terms(rank: int) -> dict[int, float]:
        terms = variance.input_term(rank, input_rows, config.groups)
        return dict(zip(input_rows, terms, strict=True))

    configs: list[MemAOP | None] = [None]
    v, flops = [0.0], [exact - not_asked]
    for candidate, relative in candidates.items():
        ranks = (0, 0)
        if candidate.memory_kind is not None:
            ranks = candidate.ranks(layer.in_features, layer.out_features)
        added = kernel_terms(ranks)[candidate.selected_rows(layer.rows)]
        if candidate.input_grad:
            added += input_terms(candidate.input_grad.rank)[candidate.input_rows(layer.rows)]
        configs.append(candidate)
        v.append(added)
        flops.append(exact * relative - not_asked)
    return _Options(configs, np.array(v), np.array(flops) * len(last.calls))


def _plain(config: MemAOP) -> MemAOP:
    """What all configurations for a layer share."""
    return MemAOP(ratio=0.5, policy=config.policy, groups=config.groups)


@functools.lru_cache(maxsize=64)  # many layers, and many decisions, have the same
def _candidates(
    config: MemAOP, inputs_asked_for: bool, sizes: tuple[int, int, int]
) -> dict[MemAOP, float]:
    """All configurations to choose from for a layer, and what each costs relative to exact."""
    rows, in_features, out_features = sizes
    plain = _plain(config)
    approximates_inputs = inputs_asked_for and config.input_grad is not None
    input_ranks, cotangent_ranks = _ranks(in_features), _ranks(out_features)
    memories: list[dict[str, Any]] = [{}]
    if config.memory_kind is not None:
        subspace = {"memory": "subspace", "refresh": config.refresh}
        memories += [
            subspace | {"rank": (rank, other)}
            for rank in input_ranks[1:]
            for other in cotangent_ranks
        ]
    found = []
    for ratio in RATIOS:
        if plain.groups > ratio * rows:
            continue  # one row of each group at least
        for memory in memories:
            candidate = dataclasses.replace(plain, ratio=ratio, **memory)
            found.append(candidate)
            if approximates_inputs:
                found += [
                    dataclasses.replace(candidate, input_grad=InputGrad(input_ratio, rank))
                    for input_ratio in INPUT_RATIOS
                    for rank in (cotangent_ranks if memory else [0])
                ]
    return {candidate: relative_cost(candidate, *sizes) for candidate in found}


def _largest(config: MemAOP, layer: Layer) -> MemAOP:
    """The configuration with the largest ranks to choose from, to measure a layer with."""
    # one direction at least: a `Norms` probe has both sides
    ranks = max(1, *_ranks(layer.in_features)), max(1, *_ranks(layer.out_features))
    input_grad = config.input_grad and InputGrad(INPUT_RATIOS[0], min(32, layer.out_features // 4))
    return dataclasses.replace(_plain(config), memory="subspace", rank=ranks, input_grad=input_grad)


def _ranks(features: int) -> list[int]:
    return [rank for rank in RANKS if 4 * rank <= features]


# ---- the choices for all layers


def _best(
    options: dict[str, _Options], budget: float | None
) -> tuple[tuple[Choice, ...], float, float]:
    """The choices of least v that meet the budget, or of least (1 + v) c; their v and c.

    They are looked for among the choices that are best at some price of FLOPs, the same price in
    all layers.
    """
    exact = sum(layer.flops[0] for layer in options.values())
    prices = np.array([0, *np.geomspace(1e-6, 1e6, 1200)])[:, None]
    indices = {  # for each layer and price, of the option with the least v + price * c
        path: np.argmin(layer.v[None] + prices * layer.flops[None] / exact, axis=1)
        for path, layer in options.items()
    }
    v = sum(layer.v[indices[path]] for path, layer in options.items())
    c = sum(layer.flops[indices[path]] for path, layer in options.items()) / exact
    if budget is not None and budget < c.min():
        raise ValueError(
            f"allocate: got budget={budget}; the cheapest choice for these layers costs "
            f"{c.min():.3f} of exact steps. Give more."
        )
    best = np.argmin((1 + v) * c if budget is None else np.where(c <= budget, v, np.inf))
    choices = []
    for path, layer in options.items():
        i = indices[path][best]
        relative = float(layer.flops[i] / layer.flops[0])
        choices.append(Choice(path, layer.configs[i], float(layer.v[i]), relative))
    return tuple(choices), float(v[best]), float(c[best])


def _config_cells(config: MemAOP | None) -> tuple[str, str, str, str]:
    """Rows, rank, rows for dX and rank for dX, for the table."""
    if config is None:
        return "exact", "", "exact", ""
    rank = "{} + {}".format(*config.rank) if isinstance(config.rank, tuple) else ""  # no memory
    input_grad = config.input_grad
    drawn = (f"{input_grad.ratio:.3g}", str(input_grad.rank)) if input_grad else ("exact", "")
    return f"{config.ratio:.3g}", rank, *drawn
