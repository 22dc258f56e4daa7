"""FLOPs of a dense layer's step, exact and approximate."""

from mem_aop_jax.config import MemAOP


def relative_cost(config: MemAOP, rows: int, in_features: int, out_features: int) -> float:
    """FLOPs of one layer's step, relative to those of the exact layer.

    A step is forward, gradient of the inputs (exact) and gradient of the kernel: a product of the
    three sizes each.
    """
    exact = 2 * rows * in_features * out_features
    estimate = weight_gradient_flops(config, rows, in_features, out_features)
    return (2 * exact + estimate) / (3 * exact)


def weight_gradient_flops(config: MemAOP, rows: int, in_features: int, out_features: int) -> int:
    """FLOPs of the kernel's gradient: of its products and of the rows' norms."""
    k = config.selected_rows(rows)
    norms = 6 * rows * (in_features + out_features)  # three squares, three sums
    if config.memory_kind != "subspace":
        return 2 * k * in_features * out_features + norms
    of_inputs, of_cotangents = config.ranks(in_features, out_features)
    rank = of_inputs + of_cotangents
    # The coordinates; then the products of all rows with the coordinates of both sides.
    passes = 2 * rows * (in_features * (of_inputs + rank) + out_features * (of_cotangents + rank))
    return 2 * (k + rank) * in_features * out_features + passes + norms
