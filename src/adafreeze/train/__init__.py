"""The engine of ``adafreeze train`` and ``compare``, also for scripts.

from adafreeze.train import Arguments, compare, train

reviews = Arguments.of(model_name_or_path=..., task="text-classification", train_file=..., output_dir="runs/first")
metrics = train(reviews)
comparison = compare({"reviews": reviews}, ["plain", "safe"], seeds=[0, 1], output_dir="runs/table")
"""

from .arguments import Arguments
from .grid import Comparison, compare
from .run import train

__all__ = ["Arguments", "train", "Comparison", "compare"]
