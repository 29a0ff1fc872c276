"""How long `python -m topkbench +method=hard` takes to its first step, beside `import torch` alone.

    python experiments/start_up.py

Fresh processes, in turn; medians.
"""

import statistics
import subprocess
import sys
import time

TO_THE_FIRST_STEP = """
import os, sys
import topkbench.cli
import topkbench.train
topkbench.train.train = lambda *_, **__: os._exit(0)
sys.argv = ["topkbench", "+method=hard"]
topkbench.cli.main()
"""
ROUNDS = 9


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter that runs the code."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    pairs = [(seconds("import torch"), seconds(TO_THE_FIRST_STEP)) for _ in range(ROUNDS)]
    alone, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(ours / alone for alone, ours in pairs)
    print(f"import torch {alone:.2f} s, to the first step {ours:.2f} s, ratio {ratio:.2f}")
