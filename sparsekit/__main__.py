"""`python -m sparsekit` is the `sparsekit` command: for launchers that start Python modules, such as torchrun."""

from sparsekit.cli.app import main

main()
