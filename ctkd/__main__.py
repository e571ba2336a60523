"""``python -m ctkd`` is the command ``ctkd``."""

from ctkd.cli import main

main()
