"""`python -m pabee_jax.export`: the command `pabee-jax export`."""

from pabee_jax.commands.export import main

main()
