"""TPU kernels for some rows of an array, which come one by one from where the array is.

XLA copies an array of bfloat16 whole into on-chip memory before it gathers rows of it. Two of its
rows share their words: they come and go together.
"""

import functools

import chex
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mem_aop_jax._compat import TPU_COPIES_ROWS, shape_like
from mem_aop_jax._kernels.row_sums_tpu import (
    IN_ORDER,
    SUBLANES,
    VMEM,
    left_in_hbm,
    shape_in_hbm,
    whole_tiles,
)

ON_CHIP = 2**24  # bytes of a result that XLA leaves there, of what it needs at once
NUMBERS = 2**16  # of rows, of which the memory for scalars holds three arrays
STAYS, GONE = -2, -1  # states of a row that was not chosen; else when it last was, which is more


def choose_block_rows(rows: int, chosen: int, features: int, dtype, rank: int = 0) -> int | None:
    """How many rows these kernels have on the chip, None if they cannot run.

    Args:
      rows: how many rows there are, of `replace_product_rows` in its result.
      chosen: how many of them are chosen or sampled.
      features: of the rows.
      dtype: of the rows.
      rank: how many directions there are beside.
    """
    whole = whole_tiles(rows, features, dtype)
    if not TPU_COPIES_ROWS or not whole or max(rows, chosen) > NUMBERS:
        return None
    size = jnp.dtype(dtype).itemsize
    of_row, directions = 3 * 4 + 2 * size + 2 * 4, 2 * 4 * rank  # words, results, products
    fit = (of for of in (128, 64, 32, SUBLANES) if features * (of * of_row + directions) <= VMEM)
    return next(fit, None)


def gather_rows(rows: chex.Array, chosen: chex.Array, block: int) -> chex.Array:
    """The chosen rows.

    Args:
      rows: `(rows, features)`, float32 or bfloat16.
      chosen: `(k,)` int32, each one of the rows; some may be the same.
      block: from `choose_block_rows`.
    """
    (found,) = _by_words(_take, [_whole(chosen, block)], [], [], rows, block)
    return found[: len(chosen)]


def _take(numbers, shifts, rows, out, *buffers, block):
    out[...] = _rows_of(_arrive(numbers, rows, *buffers, block), shifts[...], out.dtype)


def gather_residuals(
    rows: chex.Array,
    chosen: chex.Array,
    weights: chex.Array,
    coordinates: chex.Array,
    basis: chex.Array,
    block: int,
    precision: lax.Precision,
    add_projection: bool,
    dtype,
) -> chex.Array:
    """What a basis does not hold of the chosen rows, with weights.

    Args:
      rows: as in `gather_rows`.
      chosen: as in `gather_rows`.
      weights: `(k,)` float32.
      coordinates: `(k, q)`, those of the chosen rows.
      basis: `(q, features)`.
      block: from `choose_block_rows`.
      precision: of the product of these.
      add_projection: whether to add what the basis holds.
      dtype: of the result.
    """
    numbers, *blocks = (_whole(of, block) for of in (chosen, weights[:, None], coordinates))
    kernel = functools.partial(_take_outside, precision=precision, add_projection=add_projection)
    (found,) = _by_words(kernel, [numbers], blocks, [basis], rows, block, dtype)
    return found[: len(chosen)]


def _take_outside(
    numbers,
    shifts,
    weights,
    coordinates,
    basis,
    rows,
    out,
    *buffers,
    block,
    precision,
    add_projection,
):
    found = _rows_of(_arrive(numbers, rows, *buffers, block), shifts[...], rows.dtype)
    held = _product(coordinates, basis, precision)
    rest = weights[...] * (found.astype(jnp.float32) - held)
    out[...] = (rest + held if add_projection else rest).astype(out.dtype)


def replace_product_rows(
    sampled: chex.Array,
    at: chex.Array,
    coordinates: chex.Array,
    directions: chex.Array,
    block: int,
    precision: lax.Precision,
) -> chex.Array:
    """Rows of `coordinates @ directions`, or those that were sampled.

    Args:
      sampled: `(k, features)`, float32, or bfloat16 for an even k; the dtype of the result.
      at: `(rows,)` int32, which of these a row is; -1 is none.
      coordinates: `(rows, q)`.
      directions: `(q, features)`.
      block: from `choose_block_rows`.
      precision: of the product.
    """
    kernel = functools.partial(_place, precision=precision)
    args = [at], [coordinates], [directions], sampled, block
    (found,) = _by_words(kernel, *args, arriving=len(sampled))
    return found


def _place(numbers, shifts, coordinates, directions, sampled, out, *buffers, block, precision):
    found = _arrive(numbers, sampled, *buffers, block)
    found = _rows_of(found, jnp.maximum(shifts[...], 0), out.dtype).astype(jnp.float32)
    inside = _product(coordinates, directions, precision)
    is_sampled = jnp.broadcast_to(shifts[...] >= 0, inside.shape)
    out[...] = jnp.where(is_sampled, found, inside).astype(out.dtype)


def extract_rows(
    rows: chex.Array, chosen: chex.Array, stay: chex.Array, block: int
) -> tuple[chex.Array, chex.Array]:
    """The chosen rows; and in the place of all rows those that stay, and zeros.

    Args:
      rows: as in `gather_rows`.
      chosen: as in `gather_rows`.
      stay: `(rows,)` bool, none of the chosen ones. Only if there are others, too, that do not
        stay, all rows are looked through.
      block: from `choose_block_rows`.
    """
    numbers = _whole(chosen, block)
    order = jnp.arange(len(numbers), dtype=jnp.int32)
    state = jnp.where(stay, STAYS, GONE).astype(jnp.int32)
    state = state.at[numbers].max(order)
    scalars = numbers, state, jnp.any(state == GONE).astype(jnp.int32)[None]
    found, rest = _by_words(_take_out, scalars, [], [], rows, block, rest=True)
    return found[: len(chosen)], rest


def _take_out(numbers, state, others, shifts, rows, out, rest, *buffers, block):
    *buffers, left, gone = buffers
    step, steps = pl.program_id(0), pl.num_programs(0)
    packed = rows_of_word(rows.dtype)
    zeros = packed * block  # where they are in `left`
    found = _arrive(numbers, rows, *buffers, block)
    out[...] = _rows_of(found, shifts[...], out.dtype)

    def for_each(step, do):
        """For one of the rows that share their words, the one that is chosen last."""

        def of_row(row):
            at = step * block + row
            states = [state[(numbers[at] & -packed) + of] for of in range(packed)]
            none_stays = functools.reduce(jnp.minimum, states) > STAYS
            here = _words_of(jnp.where(none_stays, zeros, packed * row), left)
            copy = pltpu.make_async_copy(here, _words_of(numbers[at], rest), gone)
            pl.when(functools.reduce(jnp.maximum, states) == at)(lambda: do(copy))

        lax.fori_loop(0, block, lambda row, _: of_row(row), None)

    @pl.when(step == 0)
    def _():
        left[zeros:] = jnp.zeros((packed, left.shape[1]), left.dtype)

    pl.when(step > 0)(lambda: for_each(step - 1, lambda copy: copy.wait()))
    left[:zeros] = pltpu.bitcast(_other_rows(found, shifts[...], left.dtype), left.dtype)
    for_each(step, lambda copy: copy.start())

    def copied(source, target):
        copy = pltpu.make_async_copy(source, target, gone)
        copy.start()
        copy.wait()

    def clean(row, _):
        @pl.when(state[row] == GONE)
        def _():
            here, there = _words_of(0, left), _words_of(row, rest)
            copied(there, here)
            of_others = pltpu.bitcast(here[...], jnp.int32)
            of_others = _other_rows(of_others, _shift(row, rows), left.dtype)
            here[...] = pltpu.bitcast(of_others, left.dtype)
            copied(here, there)

    @pl.when(step + 1 == steps)
    def _():
        for_each(step, lambda copy: copy.wait())
        pl.when(others[0] == 1)(lambda: lax.fori_loop(0, len(state), clean, None))


# ---- what they share


def _whole(chosen, block):
    """Whole blocks, of which the last one ends with copies of the last."""
    return jnp.pad(chosen, [(0, -len(chosen) % block)] + [(0, 0)] * (chosen.ndim - 1), mode="edge")


def rows_of_word(dtype) -> int:
    """How many rows share their words."""
    return 4 // jnp.dtype(dtype).itemsize


def _shift(number, rows):
    """By how many bits its words are to be shifted for a row; negative for a negative number."""
    return jnp.where(number < 0, -1, 16 * (number & (rows_of_word(rows.dtype) - 1)))


def _other_rows(words, shifts, dtype):
    """The words without that row, for which 0 is left."""
    if dtype == jnp.float32:
        return jnp.zeros_like(words)
    return words & ~(0xFFFF << jnp.broadcast_to(shifts, words.shape))


def _by_words(kernel, scalars, blocks, whole, rows, block, dtype=None, rest=False, arriving=None):
    """`(k, features)`, of a kernel for the words of k rows, and all rows changed in their place.

    Args:
      kernel: of all that follows, the results and the buffers.
      scalars: `(k,)` numbers of rows, negative for none, and others.
      blocks: `(k, any)`, of which the kernel has a block, after one of shifts.
      whole: of which it has all.
      rows: of which it has none.
      block: its number of rows.
      dtype: of the result; None is that of rows.
      rest: whether the rows change.
      arriving: how many words come; None is k.
    """
    number, features = len(scalars[0]), rows.shape[1]
    blocks = _shift(scalars[0][:, None], rows), *blocks
    arrays = *scalars, *blocks, *whole, left_in_hbm(rows)
    dtype = dtype or rows.dtype

    def of_block(columns):
        return pl.BlockSpec((block, columns), lambda step, *_: (step, 0))

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    packed = rows_of_word(rows.dtype)
    buffers = [pltpu.VMEM((2, packed * block, features), rows.dtype), pltpu.SemaphoreType.DMA((2,))]
    if rest:  # with words of zeros
        left = packed * (block + 1), features
        buffers += [pltpu.VMEM(left, rows.dtype), pltpu.SemaphoreType.DMA(())]
    words_moved = 4 * features * (1 + rest) * (arriving or number)
    result = number * features * jnp.dtype(dtype).itemsize
    return pl.pallas_call(
        functools.partial(kernel, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(number // block,),
            in_specs=[
                *(of_block(of.shape[1]) for of in blocks),
                *(pl.BlockSpec(of.shape, lambda step, *_: (0, 0)) for of in whole),
                in_hbm,
            ],
            out_specs=[of_block(features), *([in_hbm] * rest)],
            scratch_shapes=buffers,
        ),
        out_shape=[
            shape_like((number, features), dtype, arrays),
            *([shape_in_hbm(rows, arrays)] * rest),
        ],
        input_output_aliases={len(arrays) - 1: 1} if rest else {},
        cost_estimate=pl.CostEstimate(
            flops=sum(2 * number * of.size for of in whole),
            bytes_accessed=words_moved
            + (result if result > ON_CHIP else 0)
            + sum(of.nbytes for of in (*blocks, *whole)),
            transcendentals=0,
        ),
        compiler_params=IN_ORDER,
    )(*arrays)


def _words_of(number, rows):
    """The rows that share the words of one."""
    packed = rows_of_word(rows.dtype)
    return rows.at[pl.ds(pl.multiple_of(number & -packed, packed), packed)]


def _arrive(numbers, rows, came, arrived, block):
    """`(block, features)` int32, the words of this step; those of the next one are on their way.

    Nothing comes for a negative number.
    """
    step, steps = pl.program_id(0), pl.num_programs(0)

    def for_each(step, do):
        def of_row(row):
            number, slot = numbers[step * block + row], step & 1
            here = _words_of(rows_of_word(rows.dtype) * row, came.at[slot])
            copy = pltpu.make_async_copy(_words_of(number, rows), here, arrived.at[slot])
            pl.when(number >= 0)(lambda: do(copy))

        lax.fori_loop(0, block, lambda row, _: of_row(row), None)

    pl.when(step == 0)(lambda: for_each(step, lambda copy: copy.start()))
    pl.when(step + 1 < steps)(lambda: for_each(step + 1, lambda copy: copy.start()))
    for_each(step, lambda copy: copy.wait())
    return pltpu.bitcast(came[step & 1], jnp.int32)


def _rows_of(words, shifts, dtype):
    """Of each word the row for which so many bits are to be shifted away."""
    if dtype == jnp.float32:
        return pltpu.bitcast(words, dtype)
    upper = lax.shift_right_logical(words, jnp.broadcast_to(shifts, words.shape)) << 16
    return pltpu.bitcast(upper, jnp.float32).astype(dtype)  # bfloat16 is its upper half


def _product(a, b, precision):
    return lax.dot_general(
        a[...],
        b[...],
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
