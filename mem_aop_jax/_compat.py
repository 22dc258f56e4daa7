"""All that differs between the supported versions of JAX and Flax."""

import jax

try:
    from jax.experimental.pallas import triton as pallas_triton
except ImportError:  # jax 0.12 announces its end
    pallas_triton = None  # type: ignore[assignment]

TPU_COPIES_ROWS = jax.__version_info__ >= (0, 10, 2)  # its compiler before: whole tiles alone


def varying_axes(x) -> frozenset[str]:
    """The manual mesh axes (of `jax.shard_map`) over which x differs from device to device."""
    return varying_axes_of_type(jax.typeof(x))


def varying_axes_of_type(aval) -> frozenset[str]:
    """The same, of a value that has this type."""
    if hasattr(aval, "vma"):  # jax < 0.10
        return aval.vma
    return aval.manual_axis_type.varying


def axes_of(*trees) -> frozenset[str]:
    """The manual mesh axes over which any of the arrays differs from device to device."""
    return frozenset().union(*map(varying_axes, jax.tree.leaves(trees)))


def vary(x, axes: frozenset[str]):
    """x, typed as differing over these mesh axes too. Its transpose sums over the new ones."""
    new = tuple(sorted(axes - varying_axes(x)))
    if not new:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, new, to="varying")
    return jax.lax.pvary(x, new)  # type: ignore[attr-defined]  # jax < 0.9


def shape_like(shape: tuple[int, ...], dtype, arrays) -> jax.ShapeDtypeStruct:
    """The shape of a result that differs over the mesh axes over which any of the arrays does."""
    axes = axes_of(arrays)
    if hasattr(jax.typeof(arrays[0]), "vma"):  # jax < 0.10
        return jax.ShapeDtypeStruct(shape, dtype, vma=axes)  # type: ignore[call-arg]
    kind = jax.typeof(arrays[0]).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kind)(varying=axes))


def jax_option(name: str):
    """A setting of `jax.config`, whose type hints do not know it."""
    return getattr(jax.config, name)


def is_exported(module) -> bool:
    """Whether a module, in the context of a lowering, is for `jax.export`."""
    return module.lowering_parameters.for_export


def get_value(variable):
    """What an NNX variable holds, a pytree."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value  # flax < 0.12


def set_value(variable, value) -> None:
    """Puts a pytree into an NNX variable."""
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:  # flax < 0.12
        variable.value = value


def primitive_of(equation) -> tuple[str, dict]:
    """The name of an equation's primitive and its parameters."""
    hidden = equation.params.get("_prim")  # jax > 0.11: of a kind of its own, as its new remat is
    if hidden is None:
        return equation.primitive.name, equation.params
    kind = type(hidden).__name__
    return {"RematTraced": "checkpoint"}.get(kind, kind), hidden.params


def scan_counts(equation) -> tuple[int, int]:
    """How many inputs of a scan's equation are constants, and how many its carry."""
    params = equation.params
    if "num_consts" in params:  # jax < 0.12
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def scan_options(equation) -> dict:
    """The arguments of `lax.scan` that its equation was made with."""
    names = ("length", "reverse", "unroll", "_split_transpose")
    return {name: equation.params[name] for name in names if name in equation.params}


def shard_map_options(equation) -> dict:
    """The arguments of `jax.shard_map` that its equation was made with."""
    params = equation.params
    axes = params.get("newly_manual_axes", params.get("manual_axes"))  # jax < 0.10
    names = ("mesh", "in_specs", "out_specs", "check_vma")
    return {name: params[name] for name in names} | {"axis_names": axes}


def jaxpr_of(whole, inputs, outputs, equations):
    """A jaxpr of some equations of another one."""
    names = {"arg_names": ("",) * len(inputs), "result_paths": ("",) * len(outputs)}
    return whole.replace(
        constvars=[],
        invars=inputs,
        outvars=outputs,
        eqns=list(equations),
        effects=frozenset().union(*(equation.effects for equation in equations)),
        debug_info=whole.debug_info._replace(**names),
    )


def settings_of(equation):
    """Enters the settings of JAX (dtypes, meshes, ...) under which an equation was written."""
    return lambda: equation.ctx.manager
