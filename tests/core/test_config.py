import dataclasses
import functools
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mem_aop_jax as aop
from mem_aop_jax._core import config, memory_kinds, policies


@dataclasses.dataclass
class Unhashable:
    def __call__(self, key, scores, k):
        return aop.Selection(jnp.arange(k))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"k=None and ratio=None; give exactly one"),
        ({"k": 3, "ratio": 0.5}, ValueError, r"k=3 and ratio=0.5; give exactly one"),
        ({"k": 0}, ValueError, r"k=0; it must be at least 1"),
        ({"k": True}, TypeError, r"k=True; it must be an integer"),
        ({"ratio": True}, TypeError, r"ratio=True; it must be a number"),
        ({"k": 1, "memory_dtype": "banana"}, TypeError, r"memory_dtype=banana; .* floating"),
        (
            {"k": 1, "memory": np.ones(2)},
            ValueError,
            r"memory=array.*; it is one of 'auto', 'rows'",
        ),
        ({"k": 2.5}, TypeError, r"k=2.5; it must be an integer"),
        ({"ratio": 0.0}, ValueError, r"ratio=0.0; it must lie in \(0, 1\]"),
        ({"ratio": 1.5}, ValueError, r"ratio=1.5; it must lie in \(0, 1\]"),
        ({"ratio": float("nan")}, ValueError, r"ratio=nan; it must lie in \(0, 1\]"),
        ({"ratio": "half"}, TypeError, r"ratio='half'; it must be a number in \(0, 1\]"),
        ({"k": 1, "decay": -0.1}, ValueError, r"decay=-0.1; it must lie in \[0, 1\]"),
        ({"k": 1, "decay": 1.1}, ValueError, r"decay=1.1; it must lie in \[0, 1\]"),
        (
            {"k": 1, "policy": "top-k"},
            ValueError,
            r"policy='top-k'; the known ones are 'topk', .*'priority', .* or give a callable",
        ),
        ({"k": 1, "policy": ["topk"]}, ValueError, r"policy=\['topk'\]; the known ones"),
        ({"k": 1, "policy": Unhashable()}, TypeError, r"which is not hashable; give a function"),
        ({"k": 1, "memory": "row"}, ValueError, r"memory='row'; it is one of 'auto', 'rows', 's"),
        (
            {"k": 1, "policy": "priority", "memory": "rows"},
            ValueError,
            r"memory='rows' and policy='priority', whose weights make up for the rows",
        ),
        (
            {"k": 1, "policy": "topk", "memory": "subspace"},
            ValueError,
            r"memory='subspace' and policy='topk', which drops the rows .* 'priority', 'crs', 'un",
        ),
        ({"k": 1, "rank": 0}, ValueError, r"rank=0; it must be at least 1"),
        ({"k": 1, "rank": 1.5}, TypeError, r"rank=1.5; it must be an integer"),
        ({"k": 1, "rank": (1, 2, 3)}, ValueError, r"rank=\(1, 2, 3\); .* two: for inputs and"),
        ({"k": 1, "rank": (0, 2)}, ValueError, r"rank=0; it must be at least 1"),
        ({"k": 1, "rank": 8}, ValueError, r"rank=8, which memory='rows' does not have"),
        (
            {"k": 1, "memory": None, "decay": 0.5},
            ValueError,
            r"decay=0.5, which memory=None does not have.*memory='rows'",
        ),
        (
            {"k": 1, "policy": "priority", "signed": True},
            ValueError,
            r"signed=True, which memory=None does not have",
        ),
        ({"k": 1, "refresh": 2}, ValueError, r"refresh=2, which memory='rows' does not have"),
        ({"k": 1, "signed": 1}, TypeError, r"signed=1; it must be True or False"),
        ({"k": 1, "memory_slots": 0}, ValueError, r"memory_slots=0; it must be at least 1"),
        ({"k": 1, "memory_slots": 2.0}, TypeError, r"memory_slots=2.0; it must be an integer"),
        (
            {"k": 2, "groups": 2, "memory_slots": 3},
            ValueError,
            r"memory_slots=3 and groups=2.*multiple of groups",
        ),
        ({"k": 1, "policy": "crs", "rank": 8}, ValueError, r"rank=8, .* or use memory='subspace'"),
        (
            {"k": 1, "policy": "crs", "memory": "subspace", "decay": 0.5},
            ValueError,
            r"decay=0.5, which memory='subspace' does not have",
        ),
        ({"k": 1, "memory_dtype": jnp.int8}, TypeError, r"memory_dtype=int8; .* floating"),
        ({"k": 4, "groups": 0}, ValueError, r"groups=0; it must be at least 1"),
        ({"k": 4, "groups": 1.5}, TypeError, r"groups=1.5; it must be an integer"),
        ({"k": 6, "groups": 4}, ValueError, r"k=6 and groups=4; .* multiple of groups"),
    ],
)
def test_bad_configurations_name_what_was_given_and_wanted(arguments, error, message):
    with pytest.raises(error, match=message):
        aop.MemAOP(**arguments)


@pytest.mark.parametrize(
    ("ratio", "groups", "rows", "k"),
    [
        (0.25, 1, 128, 32),
        (0.125, 1, 64, 8),
        (0.01, 1, 8, 1),
        (1.0, 1, 7, 7),
        (0.5, 1, 5, 2),
        (0.3, 1, 9, 3),
        (0.25, 4, 128, 32),
        (0.3, 3, 27, 9),
        (0.01, 4, 8, 4),
    ],
)
def test_ratio_is_rounded_and_at_least_one_in_each_group(ratio, groups, rows, k):
    assert aop.MemAOP(ratio=ratio, groups=groups).selected_rows(rows) == k


def test_rows_that_the_configuration_does_not_fit():
    with pytest.raises(ValueError, match=r"k=9 outer products asked of a batch of 8 rows.*ratio="):
        aop.init_memory(aop.MemAOP(k=9), 8, 3, 2)
    with pytest.raises(ValueError, match=r"groups=3 do not divide a batch of 8 rows.*batch size"):
        aop.init_memory(aop.MemAOP(k=3, groups=3), 8, 3, 2)


@pytest.mark.skipif(not hasattr(jnp, "float8_e8m0fnu"), reason="this jax has no such dtype")
def test_a_memory_dtype_without_zero_and_sign():
    with pytest.raises(
        TypeError, match="memory_dtype=float8_e8m0fnu, which has no zero or no sign"
    ):
        aop.MemAOP(k=4, memory_dtype=jnp.float8_e8m0fnu)


def test_bad_arguments_of_init_memory():
    with pytest.raises(TypeError, match=r"config is of type dict, not aop\.MemAOP"):
        aop.init_memory({"k": 1}, 8, 3, 2)
    for rows in ("3", 32.0):
        with pytest.raises(TypeError, match=rf"init_memory: rows is {rows!r}; .* a whole number"):
            aop.init_memory(aop.MemAOP(k=1), rows, 8, 3)
    with pytest.raises(ValueError, match="init_memory: in_features is -1; it must be at least 0"):
        aop.init_memory(aop.MemAOP(k=1), 8, -1, 3)
    with pytest.raises(TypeError, match="dtype=int32; it must be a floating"):
        aop.init_memory(aop.MemAOP(k=1), 8, 3, 2, jnp.int32)
    with pytest.raises(ValueError, match="the batch has no rows"):
        aop.init_memory(aop.MemAOP(ratio=0.5), 0, 3, 2)


def test_a_float64_memory_without_x64_is_float32(without_x64):
    config = aop.MemAOP(k=1, memory_dtype=jnp.float64)
    with pytest.warns(UserWarning, match="float64"):  # JAX's own
        memory = aop.init_memory(config, 2, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = aop.dense(jnp.ones((2, 3)), jnp.ones((3, 4)), memory, config=config)
    assert memory.inputs.dtype == y.dtype == jnp.float32


def test_frozen_hashable_and_static_under_jit():
    config = aop.MemAOP(k=np.int64(2), memory_dtype=jnp.bfloat16)
    same = aop.MemAOP(k=2, memory_dtype="bfloat16")
    assert config == same
    assert hash(config) == hash(same)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 3

    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def static(config, x):
        traces.append(config)
        return x * config.k

    @jax.jit
    def as_pytree(config, x):
        return static(config, x)

    assert static(config, 2) == static(same, 2) == as_pytree(same, 2) == 4
    assert len(traces) == 1


def test_init_memory():
    config = aop.MemAOP(k=2, memory_dtype=jnp.bfloat16)
    memory = aop.init_memory(config, 8, 3, 2, jnp.float32)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), memory)
    assert shapes == aop.Memory(((8, 3), "bfloat16"), ((8, 2), "bfloat16"), ((), "float32"))
    assert not any(np.any(leaf) for leaf in memory)
    assert aop.init_memory(aop.MemAOP(k=2), 8, 3, 2, jnp.float64).inputs.dtype == jnp.float64
    assert aop.init_memory(aop.MemAOP(k=2, memory=None), 8, 3, 2) is None
    assert aop.init_memory(None, 8, 3, 2) is None
    for policy in ("priority", "crs", "uniform"):
        assert aop.init_memory(aop.MemAOP(k=2, policy=policy), 8, 3, 2) is None


def test_init_subspace():
    config = aop.MemAOP(k=2, policy="priority", memory="subspace", rank=3)
    memory = aop.init_memory(config, 8, 5, 2, jnp.bfloat16)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), memory)
    assert shapes == aop.Subspace(((5, 3), "float32"), ((2, 2), "float32"), ((), "float32"))
    for basis in memory[:2]:
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-6)
    assert memory.uses == 0
    assert aop.init_memory(config, 8, 5, 2, jnp.float64).inputs.dtype == jnp.float64
    one_sided = dataclasses.replace(config, rank=(3, 0))
    assert aop.init_memory(one_sided, 8, 5, 2).cotangents is None


def test_the_names_in_types_are_those_in_the_tables():
    assert typing.get_args(config.PolicyName) == tuple(policies.POLICIES)
    assert typing.get_args(config.MemoryName) == ("auto", *config.MEMORIES)
    assert {None, *config.MEMORIES} == set(memory_kinds.MEMORY_KINDS)


@pytest.mark.parametrize(
    ("make", "suggestion"),
    [
        (lambda: aop.MemAOP(ratoi=0.5), "'ratoi'.*Did you mean 'ratio'"),
        (lambda: aop.InputGrad(rnk=4), "'rnk'.*Did you mean 'rank'"),
        (lambda: aop.MemAOP(k=1, policy="prioritty"), "Did you mean 'priority'"),
        (lambda: aop.MemAOP(k=1, memory="subspce"), "Did you mean 'subspace'"),
    ],
)
def test_a_misspelt_option_suggests_the_nearest(make, suggestion):
    with pytest.raises((TypeError, ValueError), match=suggestion):
        make()
