"""topkbench: a research benchmark harness for top-k relaxations."""
