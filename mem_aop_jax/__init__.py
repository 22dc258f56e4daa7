"""Mem-AOP-GD (arXiv 2110.09164) for JAX and Flax: cheaper weight gradients of dense layers."""

from mem_aop_jax import linen, nnx
from mem_aop_jax.allocate import Allocation, allocate
from mem_aop_jax.config import InputGrad, MemAOP
from mem_aop_jax.controller import Controller, Decision
from mem_aop_jax.dense import dense, dot_general
from mem_aop_jax.diagnostics import Diagnostics, diagnostics
from mem_aop_jax.memory import Measured, Memory, Probe, Subspace, init_memory
from mem_aop_jax.policies import Selection
from mem_aop_jax.transform import (
    carry_memory,
    get_memory,
    mem_aop_sgd,
    replace_memory,
    state_shardings,
)

__all__ = [
    "Allocation",
    "Controller",
    "Decision",
    "Diagnostics",
    "InputGrad",
    "Measured",
    "MemAOP",
    "Memory",
    "Probe",
    "Selection",
    "Subspace",
    "allocate",
    "carry_memory",
    "dense",
    "diagnostics",
    "dot_general",
    "get_memory",
    "init_memory",
    "linen",
    "mem_aop_sgd",
    "nnx",
    "replace_memory",
    "state_shardings",
]
