"""FLOPs of a dense layer's step, exact and approximate."""

from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.orthonormal import rounds


def exact_flops(rows: int, in_features: int, out_features: int) -> int:
    """FLOPs of an exact layer's step: forward, gradient of the inputs, gradient of the kernel."""
    return 6 * rows * in_features * out_features


def relative_cost(config: MemAOP, rows: int, in_features: int, out_features: int) -> float:
    """FLOPs of one layer's step, relative to those of the exact layer."""
    sizes = rows, in_features, out_features
    estimate = weight_gradient_flops(config, *sizes) + input_gradient_flops(config, *sizes)
    return 1 / 3 + estimate / exact_flops(*sizes)


def weight_gradient_flops(config: MemAOP, rows: int, in_features: int, out_features: int) -> float:
    """FLOPs of the kernel's gradient, mean over the steps: its products and the rows' norms."""
    k = config.selected_rows(rows)
    norms = 6 * rows * (in_features + out_features)  # three squares, three sums
    if config.memory_kind != "subspace":
        return 2 * k * in_features * out_features + norms
    q, r = config.ranks(in_features, out_features)
    products = 2 * (k + q + r) * in_features * out_features
    residuals = 2 * k * (in_features * q + out_features * r)
    coordinates = 2 * rows * (q + r) * (in_features + out_features)  # X V, X^T B; G U, G^T A
    coordinates += 2 * (rows + in_features) * q * r  # V (A^T B)
    refresh = _refresh_flops(config, rows, in_features, out_features)
    return products + residuals + coordinates + refresh / config.refresh + norms


def input_gradient_flops(config: MemAOP, rows: int, in_features: int, out_features: int) -> float:
    """FLOPs of the inputs' gradient, without the products that the kernel's gradient needs too."""
    drawn = config.input_rows(rows)
    if drawn == rows:
        return 2 * rows * in_features * out_features
    rank = min(config.input_rank, out_features)
    shared_rank = config.ranks(in_features, out_features)[1] if rank else 0
    inside = 2 * rank * (rows + out_features) * in_features  # (G U) (W U)^T
    inside += 2 * rows * out_features * max(0, rank - shared_rank)  # G U
    return 2 * drawn * out_features * (in_features + rank) + inside


def flops_left_out(config: MemAOP, rows: int, in_features: int, out_features: int) -> float:
    """FLOPs that a compiler counts in each step although most steps leave them out, on average.

    It counts the more costly branch of a conditional: here the one that refreshes the directions.
    """
    if config.memory_kind != "subspace":
        return 0.0
    refresh = _refresh_flops(config, rows, in_features, out_features)
    return (1 - 1 / config.refresh) * refresh


def _refresh_flops(config, rows, in_features, out_features):
    ranks = config.held_ranks(in_features, out_features)
    return sum(
        2 * rows * features * rank + 4 * rounds(rank) * features * rank**2  # and Cholesky-QR
        for features, rank in zip((in_features, out_features), ranks, strict=True)
    )
