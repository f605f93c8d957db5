"""`pabee-jax train` from a clone: python train.py --config configs/demo.py --workdir runs/demo"""

from pabee_jax.commands.train import main

if __name__ == "__main__":
    main()
