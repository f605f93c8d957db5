"""`pabee-jax evaluate` from a clone: python evaluate.py --checkpoint runs/mrpc --patience 0,3,4"""

import sys

from pabee_jax.commands.main import main

if __name__ == "__main__":
    main(["pabee-jax", "evaluate", *sys.argv[1:]])
