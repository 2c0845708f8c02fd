"""The engine of ``adafreeze train`` and ``compare``: arguments, one run, a grid of runs, and what they print."""
