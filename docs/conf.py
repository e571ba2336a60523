"""Settings of the documentation: ``sphinx-build -W docs docs/_build`` makes it."""

import importlib.metadata

project = "ctkd"
author = "the authors of ctkd"
release = version = importlib.metadata.version("ctkd")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
]
html_theme = "furo"
html_title = f"ctkd {release}"
exclude_patterns = ["_build"]
# Names between single backticks are code.
default_role = "code"
# Options keep their two dashes.
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [
    "Shape",
    "Stored teacher",
    "Differs from the paper",
    "Differs from the released file",
]
myst_heading_anchors = 3
