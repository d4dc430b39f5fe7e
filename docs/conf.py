"""Sphinx configuration. Build with ``sphinx-build -W -n --keep-going docs docs/_build``; it needs no network."""

import os
import re
from pathlib import Path

import sharpness

HERE = Path(__file__).parent

project = "sharpness"
author = "the sharpness developers"
version = release = sharpness.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
nitpicky = True

html_theme = "furo"
html_title = f"sharpness {release}"
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Notebooks, and the pages that are notebooks in Markdown, are executed at each build, and an error in one fails the
# build. Progress bars go to stderr.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_output_stderr = "remove"
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables that a cell makes
# The pages import the example modules.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent / "examples"), os.environ.get("PYTHONPATH")]))

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {
    name: name
    for name in (
        "BatchLoss",
        "CurvatureName",
        "Grouping",
        "Initial",
        "LossFn",
        "Method",
        "Metric",
        "OnFailure",
        "OptimizerFactory",
        "ParameterChoice",
        "TargetSampler",
        "Which",
    )
}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False

# Other projects' names are not links: the build fetches nothing.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|numpy|np|os|re|scipy|torch|nn|matplotlib)\..*"),
    ("py:.*", r"Any|Axes|Callable|DataLoader|Figure|Iterable|Literal|Mapping|Module|Optimizer|Parameter|Tensor"),
    ("py:class", r"sharpness\._record\.R"),
]


def resolve_public_name(app, env, node, contnode):
    """Link a public name as docstrings write it, ``ArgumentError`` say, to where it is documented."""
    name = node.get("reftarget")
    documented = f"sharpness.{name}" if name in sharpness.__all__ else name
    python = env.get_domain("py")
    if node.get("refdomain") != "py" or documented not in python.objects:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", documented, node, contnode)


def name_aliases(app, what, name, obj, options, signature, returns):
    """Show type aliases by their names; Sphinx does not where they are part of a union."""
    return re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature or "") or None, returns


def copy_examples() -> None:
    """Copy the notebooks to where Sphinx looks for pages, each only if it has changed."""
    target = HERE / "_generated"
    target.mkdir(exist_ok=True)
    for notebook in sorted((HERE.parent / "examples").glob("*.ipynb")):
        copy, content = target / notebook.name, notebook.read_bytes()
        if not copy.is_file() or copy.read_bytes() != content:
            copy.write_bytes(content)


def setup(app):
    copy_examples()
    app.connect("autodoc-process-signature", name_aliases)
    app.connect("missing-reference", resolve_public_name)
