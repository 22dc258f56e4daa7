"""Mem-AOP-GD (arXiv 2110.09164) for JAX and Flax: cheaper weight gradients of dense layers."""

from mem_aop_jax import linen, nnx
from mem_aop_jax._analysis.advise import Advice, advise
from mem_aop_jax._analysis.allocate import Allocation, allocate
from mem_aop_jax._analysis.controller import Controller, Decision
from mem_aop_jax._analysis.diagnostics import Diagnostics, diagnostics
from mem_aop_jax._analysis.plan import Plan, Planned, plan
from mem_aop_jax._approximate.approximated import Approximated, approximate
from mem_aop_jax._approximate.reach import Reach
from mem_aop_jax._core import extend as extend
from mem_aop_jax._core.config import InputGrad, MemAOP
from mem_aop_jax._core.dense import dense, dot_general
from mem_aop_jax._core.memory import Memory, Subspace
from mem_aop_jax._core.memory_kinds import init_memory
from mem_aop_jax._core.policies import Selection
from mem_aop_jax._core.probe import Measured, Probe
from mem_aop_jax._cost.cost import Cost, cost
from mem_aop_jax._cost.device_rates import Rates, device_rates, measure_rates
from mem_aop_jax.transform import (
    carry_memory,
    get_memory,
    mem_aop_sgd,
    replace_memory,
    state_shardings,
)

__all__ = [
    "Advice",
    "Allocation",
    "Approximated",
    "Controller",
    "Cost",
    "Decision",
    "Diagnostics",
    "InputGrad",
    "Measured",
    "MemAOP",
    "Memory",
    "Plan",
    "Planned",
    "Probe",
    "Rates",
    "Reach",
    "Selection",
    "Subspace",
    "advise",
    "allocate",
    "approximate",
    "carry_memory",
    "cost",
    "dense",
    "device_rates",
    "diagnostics",
    "dot_general",
    "get_memory",
    "init_memory",
    "linen",
    "measure_rates",
    "mem_aop_sgd",
    "nnx",
    "plan",
    "replace_memory",
    "state_shardings",
]
