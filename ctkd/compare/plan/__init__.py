"""The settings of a comparison, its rows and its runs."""
