"""`python -m topkbench`."""

from topkbench.cli import main

if __name__ == "__main__":
    main()
