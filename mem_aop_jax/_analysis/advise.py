"""Does it help me? One call that measures a training step's gradient, and answers."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np

from mem_aop_jax._analysis.model_gradients import finite_norm, noise_share, squared_norm
from mem_aop_jax._analysis.plan import plan
from mem_aop_jax._analysis.subject import BackwardPass, Subject, check_batches
from mem_aop_jax._approximate.approximated import Approximated, with_rules
from mem_aop_jax._cost.device_rates import Rates
from mem_aop_jax._models import Rules

CALLER = "advise"
FOLLOWING, ROUNDS = 4, 12  # passes before the memory is as in training; passes that are measured
MARGIN = 0.03  # measurements are uncertain


@dataclasses.dataclass(frozen=True)
class Advice:
    """The answer of `advise`; its `str` has five lines.

    Attributes:
      share: of the FLOPs of contractions with parameters, those that are approximate by the rules
        of the function.
      gaining: how many of these contractions are predicted to get faster.
      contractions: how many there are.
      seconds: of the gradient of the loss: exact, and with `rules`.
      v: squared error of the gradient with `rules`, relative to the square of the exact one.
      noise: share of the square of a batch's gradient that is noise of the batch.
      rules: for `aop.approximate`: those contractions that gain. No rule is for none of them.
    """

    share: float
    gaining: int
    contractions: int
    seconds: tuple[float, float]
    v: float
    noise: float
    rules: Rules

    @property
    def c(self) -> float:
        """Time of the gradient with `rules`, relative to that of the exact one."""
        return self.seconds[1] / self.seconds[0]

    def verdict(self) -> float:
        """(1 + noise v) c: the time of a step, times how many more steps it takes."""
        return (1 + self.noise * self.v) * self.c

    @property
    def pays(self) -> bool:
        """Whether training with `rules` is predicted to take less time to the same loss."""
        return self.gaining > 0 and self.verdict() < 1 - MARGIN

    def __str__(self) -> str:
        exact, ours = (f"{1e3 * seconds:.3g} ms" for seconds in self.seconds)
        speed = f"the exact gradient takes {exact} on this {jax.default_backend()}"
        error, verdict = "not measured", "no contraction is predicted to get faster"
        if self.gaining:
            speed = f"{speed}, with the rules {ours}: c = {self.c:.2f}"
            error = (
                f"the rules add v = {self.v:.2g} of the squared gradient; the batch's own noise is "
                f"{self.noise:.2g} of it"
            )
            verdict = (
                f"a step takes {self.c:.2f} of the time, and 1 + noise v = "
                f"{1 + self.noise * self.v:.2f} times as many are needed: {self.verdict():.2f}"
            )
        return "\n".join(
            (
                f"reached: {self.share:.0%} of the FLOPs of contractions with parameters; "
                f"{self.gaining} of {self.contractions} get faster",
                f"speed:   {speed}",
                f"error:   {error}",
                f"verdict: {verdict}: it {'pays' if self.pays else 'does not pay'}",
                f"type:    {self._line()}",
            )
        )

    def _line(self) -> str:
        if self.pays:
            return "aop.approximate(loss, advice.rules), or advice.rules in a wrap"
        if not self.gaining:
            return "train exactly: no contraction is wide enough, with so many rows, to get faster"
        if self.c >= 1 - MARGIN:
            return "train exactly: what surrounds the contractions takes the time that they save"
        return "train exactly: a smaller batch is the better saving"


def advise(
    approx: Approximated,
    params: chex.ArrayTree,
    batches: Sequence[tuple],
    key: chex.PRNGKey,
    *,
    rates: Rates | None = None,
) -> Advice:
    """Measures whether training with approximate gradients pays: here, with these parameters.

    It takes `aop.plan`'s rules and computes the gradient of the loss without them and with them,
    16 times in turn, with memories that follow the batches as in training: it compares the times,
    and the gradients with the exact ones. Two gradients are compiled.

    Args:
      approx: `aop.approximate` of the loss, or of a pair of the loss and something else.
      params: parameters as they are in training: after some steps, better than at first.
      batches: two or more, of the training size: tuples of the arguments after the parameters.
      key: for the draws.
      rates: of the device, as in `aop.cost`.

    Raises:
      TypeError: not a function of `aop.approximate`; a batch that is no tuple.
      ValueError: a rule that decides about nothing; fewer than two batches; a gradient that is zero
        or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> config = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=4)
      >>> approx = aop.approximate(lambda kernel, x: jnp.mean((x @ kernel) ** 2), config)
      >>> x = jax.random.normal(jax.random.key(0), (2, 64, 8))
      >>> rates = aop.Rates("some", 1e12, 1e12, 1e11)
      >>> kernel, key = jnp.ones((8, 4)), jax.random.key(1)
      >>> advice = aop.advise(approx, kernel, [(x[0],), (x[1],)], key, rates=rates)
      >>> advice.pays, advice.gaining
      (False, 0)
    """
    check_batches(CALLER, Subject.of_function(CALLER, approx), batches)
    share = approx.reach(params, *batches[0]).share
    planned = plan(approx, params, *batches[0], rates=rates)
    gaining, contractions = sum(layer.gains for layer in planned.layers), len(planned.layers)
    exact = Subject(with_rules(approx, CALLER, ()))

    gradients = [exact.backward(params, {}, batch, key).gradient for batch in batches]
    squares = [finite_norm(CALLER, i, g, None) ** 2 for i, g in enumerate(gradients)]
    differences = [squared_norm(one, other) for one, other in itertools.pairwise(gradients)]
    noise = noise_share(differences, squares)
    if not gaining:
        alone, _ = _timed(exact, params, {}, batches[0], key)
        return Advice(share, 0, contractions, (alone, alone), 0.0, noise, ())

    ours = Subject(with_rules(approx, CALLER, planned.rules))
    memory: dict[str, Any] = ours.approx.init(params, *batches[0])
    seconds, errors = [], []
    for i in range(FOLLOWING + ROUNDS):
        number = i % len(batches)  # the memory follows the batches, as in training
        args = batches[number], jax.random.fold_in(key, i)
        exact_time, _ = _timed(exact, params, {}, *args)
        time_of_ours, found = _timed(ours, params, memory, *args)
        memory = found.memory
        if i >= FOLLOWING:
            seconds.append((exact_time, time_of_ours))
            errors.append(squared_norm(found.gradient, gradients[number]) / squares[number])
    exact_mean, mean_of_ours = map(float, np.mean(seconds, axis=0))
    v, means = float(np.mean(errors)), (exact_mean, mean_of_ours)
    return Advice(share, gaining, contractions, means, v, noise, planned.rules)


def _timed(subject: Subject, *args: Any) -> tuple[float, BackwardPass]:
    """The seconds of a backward pass, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(subject.backward(*args))
    return time.perf_counter() - start, result
