"""`python -m pabee_jax.compare`: the command `pabee-jax compare`."""

import sys

from pabee_jax.commands.main import main

main(["pabee-jax", "compare", *sys.argv[1:]])
