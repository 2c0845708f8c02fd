"""What is there: stacks, blocks, units, and their outputs on the probe."""

from .blocks import Stack, find_stacks
from .flow import Flow, trace_flow
from .probe import Probe
from .units import Unit, find_units

__all__ = ["Flow", "Probe", "Stack", "Unit", "find_stacks", "find_units", "trace_flow"]
