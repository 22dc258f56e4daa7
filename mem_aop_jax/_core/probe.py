"""What measures a layer, in place of its memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mem_aop_jax._core.memory import LayerMemory


class Measured(NamedTuple):
    """What is measured of a layer: `()` float32 each.

    Attributes:
      gradient_norm: Frobenius norm of the exact gradient of the kernel.
      estimate_norm: norm of the approximate gradient, root mean square over the draws.
      error: norm of the difference, relative to `gradient_norm`; root mean square over the draws.
      cosine: between both gradients, mean over the draws.
      v: variance over the draws, relative to the square of `gradient_norm`. For an unbiased
        estimate it is the square of `error`, up to the number of draws.
      input_v: variance of the gradient of the inputs, relative to its square; 0 if it is exact.
      noise: share of the exact gradient's square that is noise of the batch, from its parts; NaN
        where the batch has only one part.
      flops: of the exact layer's step: forward, gradient of the inputs, gradient of the kernel.
      c: FLOPs of the layer's step, relative to `flops`; mean over the steps.
      inputs_inside: share of the inputs' energy (sum of squares) inside the subspace; 0 without.
      cotangents_inside: share of the cotangents' energy.
      inputs_rank: how many of the best directions would hold 90% of the inputs' energy.
      cotangents_rank: how many would hold 90% of the cotangents'.
      chosen: share of the candidates' sum of norm products that the chosen ones have, each counted
        once; mean over the draws.
      uses: 1.
    """

    gradient_norm: chex.Array
    estimate_norm: chex.Array
    error: chex.Array
    cosine: chex.Array
    v: chex.Array
    input_v: chex.Array
    noise: chex.Array
    flops: chex.Array
    c: chex.Array
    inputs_inside: chex.Array
    cotangents_inside: chex.Array
    inputs_rank: chex.Array
    cotangents_rank: chex.Array
    chosen: chex.Array
    uses: chex.Array


class Norms(NamedTuple):
    """Norms of a layer's rows without the first 0, 1, ... directions of a `Subspace`.

    Attributes:
      inputs: `(rows, rank + 1)` float32, norms of the inputs' residuals.
      cotangents: `(rows, rank' + 1)` float32, of the cotangents'.
      of_inputs: `(rows, rank' + 1)` float32, of the products of the cotangents' residuals with the
        kernel; 0 where nobody asks for the gradient of the inputs.
      asked_for: `()` float32, 1 where somebody does.
      uses: as of a memory.
    """

    inputs: chex.Array
    cotangents: chex.Array
    of_inputs: chex.Array
    asked_for: chex.Array
    uses: chex.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("memory", "measured", "draw", "noise"),
    meta_fields=("draws",),
)
@dataclasses.dataclass(frozen=True)
class Probe:
    """Takes the place of a layer's memory; its "gradient" is what was measured of the layer.

    The gradients of the kernel and of the inputs are exact.

    Attributes:
      memory: the memory that it stands for; None where the configuration has none. Its gradient
        is 0; beside `Norms` it is the next memory.
      measured: zeros; its "gradient" is the measurement.
      draws: how many approximate gradients are drawn; with 0 nothing is measured.
      draw: None; or a number, `()` int32: then the layer's gradients are approximate, as with the
        memory alone, with a key for that number, and the probe has no gradient.
      noise: None; or a factor, `()` float32: then the error of a draw of the gradient of the
        inputs, times the factor, is added to the exact gradient, and nothing is measured.
    """

    memory: LayerMemory | None
    measured: Measured | Norms
    draws: int
    draw: chex.Array | None = None
    noise: chex.Array | None = None

    @classmethod
    def of(cls, memory: LayerMemory | None, draws: int, stack: tuple[int, ...] = ()):
        """A probe of a memory, or of a stack of them."""
        zeros = (jnp.zeros(stack, jnp.float32) for _ in Measured._fields)
        return cls(memory, Measured(*zeros), draws)

    @property
    def uses(self) -> chex.Array:
        """As of a memory."""
        return self.measured.uses


def without_probe(memory: LayerMemory | Probe | None) -> LayerMemory | None:
    """The memory that a probe stands for; any other as it is."""
    return memory.memory if isinstance(memory, Probe) else memory


def is_memory(node: object) -> bool:
    """Whether a node of a pytree is the memory of a layer, or a probe in its place."""
    return isinstance(node, LayerMemory | Probe)
