"""Sphinx builds the API reference from the docstrings:

sphinx-build -W --keep-going -b html .github/reference build/reference
"""

import pathlib
import re
import tomllib

import sphinx.util.inspect

import mem_aop_jax as aop

pyproject = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())
project = pyproject["project"]["name"]
author = project_copyright = "The mem_aop_jax authors"
version = release = pyproject["project"]["version"]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "sphinx_book_theme"
html_title = f"{project} {version}"
html_copy_source = False

default_role = "py:obj"  # docstrings have names and code in single backticks
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # a list, without entries of their own

# What signatures show, in place of what these names stand for.
EXTERNAL = (
    *("chex.Array", "chex.ArrayDType", "chex.ArrayTree", "chex.PRNGKey"),
    *("lax.DotDimensionNumbers", "lax.PrecisionLike", "optax.OptState", "optax.ScalarOrSchedule"),
    *("nn.Module", "nnx.Module", "nnx.Rngs", "nnx.State", "nnx.filterlib.Filter"),
)
CLASSES = [name for name in aop.__all__ if isinstance(getattr(aop, name), type)]
autodoc_type_aliases = {
    **{name: name for name in EXTERNAL},
    **{name: f"mem_aop_jax.{name}" for name in CLASSES},
    "LayerMemory": "mem_aop_jax.Memory | mem_aop_jax.Subspace",
    "Policy": "Callable",
    "flax_nnx.Module": "nnx.Module",
}

# Their docstrings have the forms for models, which autodoc would list a second time.
del aop.plan.register, aop.allocate.register
for config in aop.MemAOP, aop.InputGrad:  # their __new__ takes anything, for its error messages
    config.__signature__ = sphinx.util.inspect.signature(
        config.__init__, bound_method=True, type_aliases=autodoc_type_aliases
    )


def show_aliases(app, what, name, obj, options, signature, returned):
    """Names alone, where Sphinx shows how it holds them in a union."""
    if signature is None:
        return None
    texts = signature, returned or ""
    return tuple(re.sub(r"TypeAliasForwardRef\('([^']+)'\)", r"\1", text) for text in texts)


def resolve_short_name(app, env, node, content):
    """Docstrings say `aop.linen.wrap`, and `wrap` or `dense` also where that is not theirs."""
    target = node.get("reftarget", "")
    places = ["mem_aop_jax", "mem_aop_jax.linen"]
    if target.startswith("aop."):
        target, places = target.removeprefix("aop."), places[:1]
    elif "." in target:  # of another library
        return None
    for place in places:
        name = f"{place}.{target}"
        if name in env.domains["py"].objects:
            return env.domains["py"].resolve_xref(
                env, node["refdoc"], app.builder, "obj", name, node, content
            )
    return None


def setup(app):
    app.connect("autodoc-process-signature", show_aliases)
    app.connect("missing-reference", resolve_short_name)
