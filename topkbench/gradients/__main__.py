"""`python -m topkbench.gradients`: the same command line, started from conf/gradients.yaml."""

from topkbench.cli import main

if __name__ == "__main__":
    main("gradients")
