"""How much of a function's work a transformation reaches."""

from collections.abc import Sequence
from typing import NamedTuple

from mem_aop_jax._approximate.program import Site
from mem_aop_jax._tables import markdown


def share(sites: Sequence["Site | ReachedSite"]) -> float:
    """Of the FLOPs of all sites, those of the approximate ones; 0 for none."""
    reached = sum(site.flops for site in sites if site.why_exact is None)
    return reached / (sum(site.flops for site in sites) or 1)


class ReachedSite(NamedTuple):
    """A contraction with parameters.

    Attributes:
      path: of the parameter, with a suffix from its second use on.
      operation: the primitive's name.
      rows: number of rows, for one of its runs.
      in_features: contracted dimensions, multiplied.
      out_features: the kernel's other dimensions, multiplied.
      flops: of the forward product, all runs together.
      why_exact: why it is not reached; None where it is.
    """

    path: str
    operation: str
    rows: int
    in_features: int
    out_features: int
    flops: float
    why_exact: str | None

    @classmethod
    def of(cls, site: Site) -> "ReachedSite":
        """The same of a site."""
        sizes = site.contraction.sizes
        return cls(site.name, site.operation, *sizes, site.flops, site.why_exact)


class Reach(NamedTuple):
    """The contractions with parameters of a function; its `str` is a table.

    Attributes:
      sites: in the order in which the function computes them.
    """

    sites: list[ReachedSite]

    @property
    def share(self) -> float:
        """Of the FLOPs of all contractions with parameters, those of the approximate ones; or 0."""
        return share(self.sites)

    def __str__(self) -> str:
        header = ("parameter", "rows", "in", "out", "MFLOPs", "operation", "approximate")
        rows = [
            (
                site.path,
                *map(str, site[2:5]),
                f"{site.flops / 1e6:.3g}",
                site.operation,
                f"no: {site.why_exact}" if site.why_exact else "yes",
            )
            for site in self.sites
        ]
        table = markdown(header, rows)
        return f"{table}\n\n{self.share:.1%} of these FLOPs, of forward products, are approximate."
