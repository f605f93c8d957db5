"""`python -m pabee_jax.compare`: the command `pabee-jax compare`."""
