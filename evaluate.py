"""`pabee-jax evaluate` from a clone: python evaluate.py --checkpoint runs/mrpc --patience 0,3,4"""

from pabee_jax.commands.evaluate import main

if __name__ == "__main__":
    main()
