"""What is there: stacks, blocks, units, and the data that flows between them."""

from .blocks import Stack, find_stacks
from .flow import Flow, trace_flow
from .units import Unit, find_units

__all__ = ["Flow", "Stack", "Unit", "find_stacks", "find_units", "trace_flow"]
