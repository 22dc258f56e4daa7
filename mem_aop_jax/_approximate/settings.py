"""Which contractions of a function are approximate, and how."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from mem_aop_jax._approximate.contractions import Contraction
from mem_aop_jax._approximate.program import Parameter, Site
from mem_aop_jax._approximate.reach import share
from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.layout import warn_once
from mem_aop_jax._cost.cost import cost
from mem_aop_jax._cost.device_rates import Rates, device_rates
from mem_aop_jax._models import Rules, as_rules, check_all_used, config_for

BY_RULE, SLOW = ASKED_FOR = "a rule", "predicted speedup"  # why a site is exact that shall be
MUCH = 0.9  # a model of which less is reached says so


class Settings(NamedTuple):
    """Rules, and how much faster a layer must be.

    Attributes:
      caller: who has them, for error messages.
      rules: on the names of parameters and sites.
      min_speedup: a layer stays exact unless its step is predicted to be so many times faster.
      rates: of the device, for the prediction.
    """

    caller: str
    rules: Rules
    min_speedup: float | None
    rates: Rates | None

    @classmethod
    def of(
        cls,
        caller: str,
        config_or_rules: MemAOP | Sequence[tuple[str, MemAOP | None]],
        min_speedup: float | None,
    ) -> "Settings":
        """Checked settings."""
        rules = as_rules(caller, config_or_rules)
        validation.min_speedup(caller, min_speedup)
        return cls(caller, rules, min_speedup, None if min_speedup is None else device_rates())

    def decide(
        self,
        memory: Collection[str],
        parameter: Parameter,
        name: str,
        contraction: Contraction,
    ) -> tuple[MemAOP | None, str | None]:
        """The configuration of a contraction, or None and why it is exact.

        `memory` has the names of the sites that have one: no size or speed makes them exact.
        """
        config = config_for(self.rules, *parameter.names, name)
        if config is None:
            return None, BY_RULE
        inexact = {dtype.name for dtype in contraction.dtypes if not _is_floating(dtype)}
        if inexact:
            return None, f"dtype {', '.join(sorted(inexact))}"
        rows, *features = contraction.sizes
        if 0 in features:
            return None, "no features"
        if name in memory or not isinstance(rows, int):  # a symbolic dimension: nothing is known
            return config, None
        reason = why_rows_do_not_fit(config, rows)
        if reason is not None:
            return None, reason
        if self.min_speedup is not None:
            predicted = cost(config, *contraction.sizes, contraction.dtypes[0], rates=self.rates)
            if predicted.speedup < self.min_speedup:
                return None, f"{SLOW} {predicted.speedup:.2f}"
        return config, None

    def check_model(self, sites: Sequence[Site]) -> None:
        """For the sites of a model: as `check_all_used`, and says once where much is not reached.

        Raises:
          ValueError: also for a configuration that does not fit the rows of a site.
        """
        self.check_all_used(sites)
        for site in sites:
            config = config_for(self.rules, *site.parameter.names, site.name)
            rows = site.contraction.sizes[0]
            if config is not None and site.why_exact == why_rows_do_not_fit(config, rows):
                config.selected_rows(rows, site.label)  # raises where they do not fit
        chosen = [site for site in sites if not (site.why_exact or "").startswith(ASKED_FOR)]
        if chosen and share(chosen) < MUCH:
            reasons = {site.why_exact: None for site in chosen if site.why_exact}
            warn_once(
                f"{self.caller}: {share(chosen):.0%} of the FLOPs of contractions with parameters "
                f"are reached. Exact are: {'; '.join(reasons)}."
            )

    def check_all_used(self, sites: Sequence[Site]) -> None:
        """Raises a `ValueError` for a rule that decides about none of the sites, or no sites."""
        if self.rules and not sites:
            raise ValueError(
                f"{self.caller}: matches no dense layer: nothing multiplies an argument with "
                "something that is computed from parameters alone. What a function closes over "
                "counts as constant: pass the batch as an argument."
            )
        names = [(*site.parameter.names, site.name) for site in sites]
        check_all_used(self.caller, self.rules, names)


def why_rows_do_not_fit(config: MemAOP, rows: int) -> str | None:
    """Why a configuration does not fit so many rows, or None if it does."""
    if config.k is not None and config.k > rows:
        return f"k={config.k} is more than its rows"
    if rows == 0:
        return "no rows"
    if rows % config.groups:
        return f"groups={config.groups} do not divide its rows"
    return None


def _is_floating(dtype):
    return jnp.issubdtype(dtype, jnp.floating)
