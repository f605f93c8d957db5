"""`python -m pabee_jax.compare`: the command `pabee-jax compare`."""

from pabee_jax.commands.compare import main

main()
