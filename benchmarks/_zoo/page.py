"""Renders docs/families.md from the rows of benchmarks/families.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

HEAD = """# Model families

<!-- Written by `python benchmarks/families.py` from benchmarks/results/families.json. -->

Every architecture that transformers can build tiny from its configuration class, with every head that returns a loss,
plus some models with an unusual shape. Each is a random model with LoRA, trained four times for three epochs from the
same weights: without adafreeze, with `SafeConfig(freeze_at_start=0)`, with `SafeConfig()`, and with
`SafeConfig(cache="off")`. Made by `python benchmarks/families.py` with {versions}.

- **served**: the lowest blocks are frozen, and a repeated sample starts above them.
- **prefix without cache**: the lowest blocks are frozen and keep no activations, but run in every step.
- **frozen without prefix**: adapters freeze, and all blocks run as before.
- **refused**: an error or warning before the first step gives the reason.
- **FAULT**: a crash, a different loss than without adafreeze, or a missing benefit without a message.

"Until first freeze" is the largest relative difference of losses between `freeze_at_start=0` and no adafreeze: it must
be 0. "Cache on, off" is the same between cache on and off, over all steps: only rounding is allowed.

"""
ORDER = ("served", "prefix without cache", "frozen without prefix", "refused", "FAULT")
ASIDE = ("not runnable", "not installed")


def page(content: Mapping[str, Any]) -> str:
    """The page as Markdown, from the content of the JSON file."""
    rows, found = content["rows"], content["environment"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "peft"))
    counts = Counter(row["verdict"] for row in rows)
    lines = [HEAD.format(versions=versions)]
    lines.append("| verdict | families |\n|---|---|\n")
    lines += [f"| {name} | {counts[name]} |\n" for name in (*ORDER, *ASIDE) if counts[name] or name == "FAULT"]
    lines.append("\n## What was run\n\n")
    lines.append("| architecture | head | verdict | until first freeze | cache on, off | hits / misses | reason |\n")
    lines.append("|---|---|---|---|---|---|---|\n")
    ran = sorted((row for row in rows if row["verdict"] in ORDER), key=_place)
    for row in ran:
        differences = [_number(row.get(name)) for name in ("until_first_freeze", "cached_against_uncached")]
        found = f"{row['hits']} / {row['misses']}" if row.get("hits") or row.get("misses") else ""
        cells = [row["name"], row["head"], row["verdict"], *differences, found, _text(row["reason"])]
        lines.append("| " + " | ".join(cells) + " |\n")
    aside = sorted((row for row in rows if row["verdict"] in ASIDE), key=_place)
    if aside:
        lines.append("\n## Not run\n\nThe run without adafreeze fails, or the model cannot be built tiny.\n\n")
        lines.append("| architecture | head | reason |\n|---|---|---|\n")
        lines += [f"| {row['name']} | {row['head']} | {_text(row['reason'])} |\n" for row in aside]
    return "".join(lines)


def _place(row: dict[str, Any]) -> tuple[str, str]:
    return row["name"], row["head"]


def _number(value: Any) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.0e}"


def _text(text: str) -> str:
    text = re.split(r" (?:Cause|Fix): ", text)[0]  # the fact of an error
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")[:240]
