"""The variance that any choice of rows and ranks for a layer adds to a model's gradient.

On a few batches the norms of the rows' residuals outside of 0, 1, ... directions are measured. They
give the variance of any choice for a layer: rows m drawn with the probabilities
p[m] = min(1, s[m] / t), whose sum is k, add

    sum over m of (1 / p[m] - 1) ||term m||^2

with s[m] = ||Xr[m]|| ||Gr[m]|| = ||term m|| for the kernel's gradient, and for the inputs'
s[m] = ||Gr[m]||, ||term m|| = ||Gr[m] W^T||. An error of an input gradient passes through the
layers below, where it counts for more or less: the factor is measured with draws of the error, in
one layer at a time. (The backward pass is linear in the cotangents, so these variances add up; that
a layer below draws from cotangents with an error is of second order.)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax._analysis import model_gradients
from mem_aop_jax._analysis.subject import BackwardPass, Subject
from mem_aop_jax._approximate.approximated import first_memories
from mem_aop_jax._approximate.program import Site
from mem_aop_jax._approximate.tracing import leaves_by_path
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.memory import Subspace
from mem_aop_jax._core.probe import Norms, Probe
from mem_aop_jax._models import rules_for

# How many rows are drawn; or several such numbers, to choose from.
Rows = int | Sequence[int] | np.ndarray
FIRST_PASSES = 2  # over the first batch, so that the directions follow the rows


class BatchNorms(NamedTuple):
    """The norms of a layer's rows on one batch.

    Attributes:
      calls: for each call of the layer, or each member of a stack of layers.
      gradient_norm: the norm of the gradient of all parameters.
    """

    calls: list[Norms]
    gradient_norm: float

    def kernel_variance(self, ranks: tuple[int, int], k: Rows, groups: int) -> np.ndarray:
        """Variance of the kernel's gradient from k rows, outside of so many directions."""
        scores = [n.inputs[:, ranks[0]] * n.cotangents[:, ranks[1]] for n in self.calls]
        return np.sum([sampling_variance(s, s, k, groups) for s in scores], axis=0)

    def input_variance(self, rank: int, k: Rows, groups: int) -> np.ndarray:
        """Variance of the inputs' gradient from k rows, outside of so many directions."""
        pairs = [(n.cotangents[:, rank], n.of_inputs[:, rank]) for n in self.calls]
        return np.sum([sampling_variance(*pair, k, groups) for pair in pairs], axis=0)


class LayerVariance(NamedTuple):
    """The measurements that give the variance of any choice for a layer.

    Attributes:
      batches: norms of its rows, for each batch.
      weight: factor of the metric on the variance of the kernel's gradient.
      input_gain: variance of the gradient of all parameters per variance of the inputs' gradient.
    """

    batches: list[BatchNorms]
    weight: float
    input_gain: float

    def kernel_term(self, *choice: Any) -> np.ndarray:
        """Part of v (see `Choice`), for the arguments of `BatchNorms.kernel_variance`."""
        relative = [b.kernel_variance(*choice) / b.gradient_norm**2 for b in self.batches]
        return self.weight * np.mean(relative, axis=0)

    def input_term(self, *choice: Any) -> np.ndarray:
        """Part of v, for the arguments of `BatchNorms.input_variance`."""
        relative = [b.input_variance(*choice) / b.gradient_norm**2 for b in self.batches]
        return self.input_gain * np.mean(relative, axis=0)


def sampling_variance(
    scores: np.ndarray, sizes: np.ndarray, k: Rows, groups: int = 1
) -> np.ndarray:
    """Variance of a sum of terms of these sizes, of which k are drawn in proportion to the scores.

    Each group of terms has an equal share of k. For several k the terms are sorted once.
    """
    if groups > 1:
        parts = zip(scores.reshape(groups, -1), sizes.reshape(groups, -1), strict=True)
        shares = np.asarray(k) // groups
        return np.sum([sampling_variance(*part, shares) for part in parts], axis=0)
    order = np.argsort(-scores)
    s, sizes = (np.asarray(a, np.float64)[order] for a in (scores, sizes))
    squares = np.where(s > 0, sizes**2, 0)  # of terms that may be drawn
    rest, by_score, squares = (  # the sums from each term on to that of the smallest score
        np.cumsum(a[::-1])[::-1] for a in (s, squares / np.where(s > 0, s, 1), squares)
    )

    def variance(k: int) -> float:
        if k >= len(s) or not rest[0]:
            return 0.0
        thresholds = rest[:k] / (k - np.arange(k))  # where that many rows are drawn for certain
        certain = np.argmax(s[:k] <= thresholds)
        return max(0.0, thresholds[certain] * by_score[certain] - squares[certain])

    return np.vectorize(variance, otypes=[float])(k)


@dataclasses.dataclass
class Measurement:
    """Backward passes through a loss with probes. Arguments as in `allocate`.

    Attributes:
      spent: FLOPs of all passes so far.
    """

    subject: Subject
    params: chex.ArrayTree
    batches: Sequence[Any]
    key: chex.PRNGKey
    metric: chex.ArrayTree | None
    spent: float = 0.0

    def layer_variances(
        self, configs: Mapping[str, MemAOP], draws: int
    ) -> dict[str, LayerVariance]:
        """The variance of each layer, by path.

        `configs` have the largest ranks to choose from; with an `InputGrad`, errors of the layer's
        input gradient are drawn, too.
        """
        probed = self._with(configs)
        sites = probed.sites(self.params, self.batches[0], self.key)
        norms, memory, exact = self._row_norms(probed, sites)
        weights, gains = dict.fromkeys(configs, 1.0), dict.fromkeys(configs, 0.0)
        if self.metric is not None:
            sampled = self._with({path: _cheaper(config) for path, config in configs.items()})
            shapes = first_memories(sampled.sites(self.params, self.batches[0], self.key))
            fewer = model_gradients.truncate_directions(shapes, memory)
            estimate = self._pass(sampled, fewer, -1, self.key).gradient
            trees = [leaves_by_path(tree) for tree in (estimate, exact, self.metric)]
            weights = {
                site.layer.path: _weight(*(leaves[site.parameter.path] for leaves in trees))
                for site in sites
            }
        rows = {site.layer.path: site.layer.rows for site in sites}
        variances = {
            path: float(
                norms[path][-1].input_variance(
                    config.input_grad.rank, config.input_rows(rows[path]), config.groups
                )
            )
            for path, config in configs.items()
            if config.input_grad
        }
        if variances:
            gains |= self._input_gains(probed, sites, memory, variances, draws)
        return {path: LayerVariance(norms[path], weights[path], gains[path]) for path in configs}

    def _with(self, configs: Mapping[str, MemAOP]) -> Subject:
        return self.subject.by("allocate", rules_for(configs))

    def _pass(
        self, subject: Subject, memory: dict[str, Any], batch: int, key: chex.PRNGKey
    ) -> BackwardPass:
        result = subject.backward(self.params, memory, self.batches[batch], key)
        self.spent += result.flops
        return result

    def _row_norms(
        self, subject: Subject, sites: Sequence[Site]
    ) -> tuple[dict[str, list[BatchNorms]], Any, Any]:
        """Norms by path for each batch but the first; a memory, and the last batch's gradient.

        The memory is the one that the last batch was measured with: its directions come from the
        other batches.
        """
        norms: dict[str, list[BatchNorms]] = {site.layer.path: [] for site in sites}
        memory = first_memories(sites)
        for batch in [0] * FIRST_PASSES + [*range(1, len(self.batches))]:
            before = memory
            probes = model_gradients.norms_probes(before, sites)
            result = self._pass(subject, probes, batch, self.key)
            memory = model_gradients.next_memory(result.memory)
            if batch == 0:
                continue
            norm = model_gradients.finite_norm("allocate", batch, result.gradient, self.metric)
            calls: dict[str, list[Norms]] = {path: [] for path in norms}
            for site in sites:
                calls[site.layer.path] += _stack_members(result.memory[site.name].measured)
            for path, of_layer in calls.items():
                norms[path].append(BatchNorms(of_layer, norm))
        return norms, before, result.gradient

    def _input_gains(
        self,
        subject: Subject,
        sites: Sequence[Site],
        memory: dict[str, Any],
        variances: Mapping[str, float],
        draws: int,
    ) -> dict[str, float]:
        """`LayerVariance.input_gain` by path, from errors with these variances."""
        gains = dict.fromkeys(variances, 0.0)
        for key in jax.random.split(self.key, draws):
            exact = self._pass(subject, _noise_probes(memory, sites, None), -1, key).gradient
            for path, variance in variances.items():
                if variance > 0:
                    probes = _noise_probes(memory, sites, path)
                    noisy = self._pass(subject, probes, -1, key).gradient
                    square = model_gradients.squared_norm(noisy, exact, self.metric)
                    gains[path] += square / variance / draws
        return gains


def _weight(estimate: chex.Array, exact: chex.Array, metric: chex.Array) -> float:
    """The squared error of a kernel's gradient in the metric, relative to the plain one."""
    plain = model_gradients.squared_norm(estimate, exact)
    return model_gradients.squared_norm(estimate, exact, metric) / plain if plain else 0.0


def _cheaper(config: MemAOP) -> MemAOP:
    """A cheaper configuration with a larger error, to estimate the metric's weight."""
    return dataclasses.replace(config, ratio=0.25, rank=config.ranks(8, 8), input_grad=None)


def _noise_probes(
    memory: Mapping[str, Subspace], sites: Sequence[Site], noisy: str | None
) -> dict[str, Probe]:
    """Probes that add an error to the input gradient of the layer with this path alone."""
    paths = {site.name: site.layer.path for site in sites}

    def probe(name: str, subspace: Subspace) -> Probe:
        stack = jnp.shape(subspace.uses)
        noise = jnp.full(stack, float(paths[name] == noisy), jnp.float32)
        return dataclasses.replace(Probe.of(subspace, 0, stack), noise=noise)

    return {name: probe(name, subspace) for name, subspace in memory.items()}


def _stack_members(norms: Norms) -> list[Norms]:
    """The norms of each layer in a stack, or of a single layer."""
    norms = jax.tree.map(np.asarray, norms)
    stack = norms.uses.shape
    flat = [a.reshape(-1, *a.shape[len(stack) :]) for a in norms]
    return [Norms(*member) for member in zip(*flat, strict=True)]
