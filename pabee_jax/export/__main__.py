"""`python -m pabee_jax.export`: the command `pabee-jax export`."""

import sys

from pabee_jax.commands.main import main

main(["pabee-jax", "export", *sys.argv[1:]])
