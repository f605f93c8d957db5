"""The configuration of the documentation site: sphinx-build -W docs build/site."""

import pabee_jax

project = "pabee_jax"
author = "The pabee_jax authors"
release = version = pabee_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "data"]

html_theme = "sphinx_book_theme"
html_title = "pabee_jax"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "navbar_persistent": [],  # The sidebar has the search field.
}
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Anchors of headings, as on GitHub.
myst_heading_anchors = 4
# The notebooks run whenever the site is built; a cell that fails, fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 180

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
