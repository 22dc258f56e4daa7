"""Tells whoever waits what takes so long."""

import sys


def say(message: str) -> None:
    """Prints a line to stderr."""
    print(f"mem_aop_jax: {message}", file=sys.stderr, flush=True)
