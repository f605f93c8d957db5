"""`pabee-jax train` from a clone: python train.py --config configs/demo.py --workdir runs/demo"""

import sys

from pabee_jax.commands.main import main

if __name__ == "__main__":
    main(["pabee-jax", "train", *sys.argv[1:]])
