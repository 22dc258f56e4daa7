"""Tables in Markdown."""

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in which all columns but the first hold figures, aligned to the right."""
    lines = header, ("---", *["---:"] * (len(header) - 1)), *rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
