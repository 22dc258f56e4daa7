"""Without a memory: the policy chooses from the rows of the batch, and the rest is lost."""

import dataclasses

from mem_aop_jax._core.candidates import Candidates, MemoryKind, sum_of_chosen, weighted
from mem_aop_jax._kernels.row_access import gather_rows, grouped_row_norms
from mem_aop_jax._numerics import widened


class NoMemory(MemoryKind):
    """`MemAOP(memory=None)`."""

    state: type = type(None)

    def init(self, config, rows, in_features, out_features, dtype):
        """None."""
        return None

    def check(self, name, config, x, sizes, memory):
        """Nothing is one."""

    def candidates(self, call, x, g, memory, key, differentiates_inputs):
        """The rows of the batch."""
        return Rows(call, x, g, memory, key)

    def fixed_estimate(self, call, x, g, memory, chosen):
        """The sum over the chosen rows."""
        return sum_of_chosen(x, g, chosen, call.precision)


@dataclasses.dataclass(frozen=True)
class Rows(Candidates):
    """The rows of the batch."""

    def norms(self):
        """Norms of the rows."""
        return grouped_row_norms(self.x), grouped_row_norms(self.g)

    def gather(self, chosen):
        """The chosen rows."""
        rows = tuple(widened(gather_rows(rows, chosen.indices)) for rows in (self.x, self.g))
        return weighted(rows, chosen), self

    def next_memory(self, chosen, dw):
        """None."""
        return None
