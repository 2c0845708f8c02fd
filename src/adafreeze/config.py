"""SafeConfig: every setting of a run in one validated dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from .decide.policy import POLICIES
from .decide.scores import SCORES, Score
from .errors import ConfigError
from .sizes import parse_size

__all__ = ["AS_PUBLISHED", "AT_START", "PAPER", "SafeConfig"]

# The default share of the blocks that is frozen before step 0.
AT_START = 1 / 3
# Our additions to the published methods, switched off.
AS_PUBLISHED: dict[str, Any] = {"freeze_at_start": 0.0, "lr_scale": 1.0, "wait_for_loss": False, "lean": False}
# Son et al. 2025, where it differs from our defaults. The length of the warm-up is our reading: the paper leaves it
# open.
PAPER: dict[str, Any] = {"policy": "threshold", "warmup": 0.3, "ramp_end": 0.5, **AS_PUBLISHED}

_T = TypeVar("_T")


def _remember_given(cls: type[_T]) -> type[_T]:
    """Let a frozen dataclass remember the names of the arguments that were given to it, and name unknown ones.

    By wrapping ``__init__``: copies and pickles call ``__new__`` without arguments, and it would hide the signature.
    """
    make: Any = cls.__init__
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - set(names):
            close = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"{cls.__name__} has no field {name!r}; its fields are {', '.join(names)}.",
                fix=f"Did you mean {close[0]!r}?" if close else f"Remove {name!r}, or correct its spelling.",
            )
        make(self, *args, **kwargs)
        object.__setattr__(self, "_given", frozenset({*names[: len(args)], *kwargs}))

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


@_remember_given
@dataclass(frozen=True)
class SafeConfig:
    """Settings of selective adapter freezing. The defaults need no tuning.

    Shares of the run are fractions of ``total_steps``, between 0 and 1.

    Args:
        policy: **How much to freeze.** Which units freeze next. ``"share"`` (default): the longest prefix whose scores
            sum to at most ``freeze_share`` of the total. ``"threshold"``: every unit whose score is below τ(t), the
            paper's rule (``SafeConfig.paper()`` has the rest of its settings). ``"bottom_up"``: the lowest
            ``freeze_share`` of the blocks with adapters. Or a function of a ``PolicyInput`` that returns unit names;
            decorate it with ``adafreeze.decide.prefix_only`` if it freezes only prefixes.
        freeze_share: the part of the total score that may be frozen by the end of the ramp.
        threshold: τ_T of the paper, the score below which units freeze at the end of the ramp.
        freeze_at_start: the share of the blocks with adapters, rounded down, frozen before step 0 from the bottom,
            regardless of score: the peak falls from the first step on, and the cache fills in the first epoch. None
            (default) is a third; or 0 if ``freeze`` is given, with another policy than "share", with
            ``freeze_share=0``, or for AdaLoRA, whose ranks could then never move.
        freeze: names of units to freeze before step 0.
        min_live_blocks: blocks of each stack that always keep training.
        score: how a unit's importance is measured: ``"cka"`` (default), ``"cka_debiased"``, ``"local_cka"``,
            ``"grad_norm"``, ``"weight_change"``, ``"random"``; a function of two tensors of shape (tokens, features),
            the unit's representation as training began and now; or an ``adafreeze.decide.Score``.
        granularity: ``"block"``: all adapters of a transformer block are one unit. ``"site"``: each adapted layer is.
        warmup: **When to freeze.** The share of the run before the first freeze by score. It ends sooner once the
            scores have settled.
        ramp_end: the share of the run at which the threshold stops rising (t_f).
        wait_for_loss: postpone freezing, to ``ramp_end`` at most, while the training loss drops faster than on average.
            Needs a model that returns its loss.
        settle_patience: scores have settled when the policy's choice did not change over this many measurements ...
        settle_tolerance: ... and no score moved by more than this fraction of the largest.
        cache: **Where states go.** The outputs of the frozen prefix are stored, so that a sample seen before starts
            above it. ``"auto"`` (default): in memory, then on disk if ``cache_dir`` is given, and off if it cannot pay.
            ``"ram"``, ``"disk"`` or ``"off"``.
        cache_budget: the most that the cache takes in memory, and the most that it takes on disk: bytes, or a text
            such as ``"4GiB"``. It never takes more than half of the free memory.
        cache_dir: folder of the disk tier, on a local disk. Default for ``cache="disk"`` and ``keep_cache``:
            ``$ADAFREEZE_CACHE``, or ``adafreeze`` in the user's cache folder.
        keep_cache: keep the states of a prefix whose adapters are at rest (``freeze_at_start``) in ``cache_dir``, where
            the next run finds them, whatever its seed, learning rates, rank, kind of adapter or head.
            ``cache_budget`` is then that of the whole folder; ``adafreeze cache`` lists, fills and deletes. States can
            reveal the training text: keep the folder as private as the data.
        fill: ``"before"``: compute the states of all samples before step 0, in large batches without a graph. None
            (default): as they come.
        cache_dtype: None (default) stores states as the blocks return them. ``"bfloat16"`` rounds them, to half the
            bytes of float32; ``"float8_e4m3fn"`` and ``"int8"``, with a scale per token, to a quarter.
        prefix_dropout: keep the model's dropout on in the frozen prefix. Its outputs are then random, and the cache is
            off.
        memory_budget: **Memory.** The most that a training step may take on the device, weights included, from the
            first step on: bytes, a text such as ``"6GiB"``, a share of the device such as 0.5, or ``"auto"`` for what
            is free. As many blocks above the prefix as needed use activation checkpointing. None (default): the first
            steps have the peak of the run.
        checkpointing: ``"selective"``: activation checkpointing of every live block that keeps the results of matrix
            products and attention and recomputes what lies between, for about 1 % of the FLOPs. It replaces the
            model's own checkpointing, and cannot be combined with a budget, which chooses blocks by itself.
        offload: where the weights of the frozen prefix, and of input embeddings, go once the states of all samples are
            held: ``"cpu"``: to host memory. ``"disk"``: to disk, where weights that came from a safetensors file are
            read from that file. Training above them goes on as before; what still needs them (an unknown sample,
            evaluation, generation) brings them back block by block. ``"auto"`` (default): if a memory budget would
            recompute less without them. ``"off"``: they stay. With ``fill="before"`` they leave before step 0.
        lean: LoRA layers save only what their gradients need, with the same results (``adafreeze.lean``). Live blocks
            save fewer bytes where LoRA has dropout, the base is in half precision, or autocast is on.
        lr_scale: **Expert.** Factor on the learning rates once units have frozen. ``"sqrt"`` (default): √(units / live
            units), at most 3, which keeps the length of an Adam step. A number; 1 disables it. Units frozen before step
            0 do not count.
        probe_tokens: tokens on which scores are measured. More is steadier and costs more; reduced automatically if
            ``min_measurements`` of them would cost more than ``overhead``.
        normalize_rows: scale each token's vector to unit length before CKA, so that a few huge tokens (attention sinks
            of decoders) do not dominate it.
        min_measurements: the least number of measurements between the start and ``ramp_end``.
        overhead: the share of the run's FLOPs that measuring may cost.
        dry_run: log what would freeze, and freeze nothing.
        seed: of the probe's own random generator. The run's random state never advances.

    Raises:
        ConfigError: a value is out of range or a name unknown.

    >>> SafeConfig(freeze_share=0.2).freeze_share
    0.2
    >>> SafeConfig.paper().policy
    'threshold'
    """

    policy: str | Callable[..., Any] = "share"
    score: str | Callable[..., Any] = "cka"
    granularity: str = "block"
    freeze_share: float = 0.6
    threshold: float = 0.01
    warmup: float = 0.5
    wait_for_loss: bool = True
    ramp_end: float = 0.7
    settle_patience: int = 2
    settle_tolerance: float = 0.1
    min_live_blocks: int = 1
    probe_tokens: int = 2048
    normalize_rows: bool = True
    min_measurements: int = 6
    overhead: float = 0.01
    cache: str = "auto"
    cache_budget: int | str = "4GiB"
    cache_dir: str | os.PathLike[str] | None = None
    keep_cache: bool = False
    fill: str | None = None
    cache_dtype: str | None = None
    prefix_dropout: bool = False
    lr_scale: float | str = "sqrt"
    memory_budget: int | float | str | None = None
    checkpointing: str | None = None
    offload: str = "auto"
    lean: bool = True
    dry_run: bool = False
    freeze_at_start: float | None = None
    freeze: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "freeze", _names("freeze", self.freeze))
        _one_of("policy", self.policy, POLICIES)
        _one_of("score", self.score, SCORES)
        _one_of("granularity", self.granularity, ("block", "site"))
        _within("freeze_share", self.freeze_share, 0, 1)
        if self.freeze_at_start is not None:
            _within("freeze_at_start", self.freeze_at_start, 0, 1)
        _within("threshold", self.threshold, 0, 1)
        _within("warmup", self.warmup, 0, 1)
        _within("ramp_end", self.ramp_end, 0, 1)
        _within("settle_tolerance", self.settle_tolerance, 0, 1)
        _within("overhead", self.overhead, 0, 1)
        if isinstance(self.lr_scale, str):
            with suppress(ValueError):  # a number as the command line gives it
                object.__setattr__(self, "lr_scale", float(self.lr_scale))
        if not (isinstance(self.lr_scale, str) and self.lr_scale == "sqrt"):
            _within("lr_scale", self.lr_scale, 0.1, 10, also=', or "sqrt"')
        _named("cache", self.cache, ("auto", "ram", "disk", "off"))
        _named("fill", self.fill, (None, "before"))
        _named("checkpointing", self.checkpointing, (None, "selective"))
        _named("offload", self.offload, ("auto", "cpu", "disk", "off"))
        if self.offload in ("cpu", "disk") and (self.cache == "off" or self.prefix_dropout):
            given = "cache is 'off'" if self.cache == "off" else "prefix_dropout is True, which switches the cache off"
            raise ConfigError(
                f"SafeConfig.offload is {self.offload!r}, but {given}: without states every pass needs the weights.",
                fix=f"SafeConfig(offload={self.offload!r}) with cache='auto' and prefix_dropout=False",
            )
        if self.checkpointing is not None and self.memory_budget is not None:
            raise ConfigError(
                "SafeConfig.checkpointing and memory_budget are given, but a budget chooses the checkpointed blocks.",
                fix="Leave one of them out.",
            )
        _named("cache_dtype", self.cache_dtype, (None, "bfloat16", "float8_e4m3fn", "int8"))
        parse_size("SafeConfig.cache_budget", self.cache_budget)
        if self.memory_budget is not None:
            _memory_budget(self.memory_budget)
        if self.cache_dir is not None and not isinstance(self.cache_dir, (str, os.PathLike)):
            raise ConfigError(
                f"SafeConfig.cache_dir is {self.cache_dir!r}, but must be the path of a folder.",
                fix='SafeConfig(cache_dir="cache")',
            )
        if self.keep_cache and self.cache == "off":
            raise ConfigError(
                "SafeConfig.keep_cache is True, but cache is 'off', which computes no states to keep.",
                fix="SafeConfig(keep_cache=True) with cache='auto'",
            )
        if self.cache_dir is not None and self.cache in ("ram", "off") and not self.keep_cache:
            raise ConfigError(
                f"SafeConfig.cache_dir is given, but cache is {self.cache!r}, which writes nothing to it.",
                fix='SafeConfig(cache="disk", cache_dir=...), or cache="auto" for memory first',
            )
        for name in ("wait_for_loss", "normalize_rows", "prefix_dropout", "lean", "dry_run"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"SafeConfig.{name} is {getattr(self, name)!r}, but must be True or False.",
                    fix=f"SafeConfig({name}={getattr(type(self), name)})",
                )
        for name, least, most in (
            ("settle_patience", 1, math.inf),
            ("min_live_blocks", 0, math.inf),
            ("probe_tokens", 2, math.inf),
            ("min_measurements", 1, math.inf),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(
                    f"SafeConfig.{name} is {value!r}, but must be a whole number, at least {least}"
                    + ("." if most == math.inf else f" and at most {most}."),
                    fix=f"SafeConfig({name}={max(least, getattr(type(self), name))})",
                )
        if self.ramp_end < self.warmup:
            raise ConfigError(
                f"SafeConfig.ramp_end ({self.ramp_end}) is before warmup ({self.warmup}), from which the threshold "
                "rises.",
                fix=f"SafeConfig(warmup={max(0.0, self.ramp_end - 0.2):g}, ramp_end={self.ramp_end})",
            )

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that were given; the others are defaults.

        A resumed run takes the given ones from here and the others from its checkpoint.

        >>> sorted(SafeConfig(freeze_share=0.6, seed=1).given)
        ['freeze_share', 'seed']
        """
        given: frozenset[str] = vars(self).get("_given", frozenset())
        return given

    def changed(self, **fields: Any) -> SafeConfig:
        """A copy with other values of some fields, and the same ``given`` (``dataclasses.replace`` gives all).

        >>> SafeConfig(seed=1).changed(cache="off").given
        frozenset({'seed'})
        """
        config = dataclasses.replace(self, **fields)
        object.__setattr__(config, "_given", self.given)
        return config

    @property
    def share_at_start(self) -> float:
        """``freeze_at_start``, with None resolved."""
        if self.freeze_at_start is not None:
            return self.freeze_at_start
        return AT_START if self.policy == "share" and self.freeze_share > 0 and not self.freeze else 0.0

    @property
    def cache_bytes(self) -> int:
        """``cache_budget`` in bytes."""
        return parse_size("SafeConfig.cache_budget", self.cache_budget)

    @property
    def memory_limit(self) -> int | float | str | None:
        """``memory_budget`` in bytes, as a share of the device (a float), ``"auto"``, or None."""
        return None if self.memory_budget is None else _memory_budget(self.memory_budget)

    @classmethod
    def paper(cls, **overrides: Any) -> SafeConfig:
        """The method as published: the cubic threshold on raw scores, for units in any block."""
        return cls.from_dict({**PAPER, **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SafeConfig:
        """Build from a mapping, as a file has it; raises a ConfigError for an unknown field."""
        return cls(**{str(name): value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the journal; functions by their name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("policy", "score"):
            if isinstance(values[name], Score):
                values[name] = values[name].name
            elif callable(values[name]):
                values[name] = getattr(values[name], "__qualname__", repr(values[name]))
        if values["cache_dir"] is not None:
            values["cache_dir"] = os.fspath(values["cache_dir"])
        return values


def _memory_budget(value: Any) -> int | float | str:
    """Bytes, a share of the device as a float, or ``"auto"``."""
    if value == "auto":
        return "auto"
    with suppress(ValueError, TypeError):
        share = float(value) if isinstance(value, (float, str)) else 0.0
        if 0 < share <= 1:
            return share
    also = ', or a share of the device from above 0 to 1, or "auto"'
    return parse_size("SafeConfig.memory_budget", value, "6GiB", also)


def _named(name: str, value: Any, known: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in known:
        raise ConfigError(
            f"SafeConfig.{name} is {value!r}, but must be one of {', '.join(map(repr, known))}.",
            fix=f"SafeConfig({name}={getattr(SafeConfig, name)!r})",
        )


def _one_of(name: str, value: Any, known: Any) -> None:
    own = name != "granularity" and (callable(value) or isinstance(value, Score))
    if own or (isinstance(value, str) and value in known):
        return
    raise ConfigError(
        f"SafeConfig.{name} is {value!r}, but must be one of {', '.join(sorted(known))}"
        + ("." if name == "granularity" else ", or a function."),
        fix=f'SafeConfig({name}="{getattr(SafeConfig, name)}")',
    )


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, Iterable) and not isinstance(value, str):
        names = tuple(value)
        if all(isinstance(one, str) for one in names):
            return tuple(dict.fromkeys(names))
    raise ConfigError(
        f"SafeConfig.{name} is {value!r}, but must be a list of unit names.",
        fix=f"SafeConfig({name}=[{value if isinstance(value, str) else '...'!r}])",
    )


def _within(name: str, value: Any, low: float, high: float, also: str = "") -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ConfigError(
            f"SafeConfig.{name} is {value!r}, but must be a number between {low} and {high}{also}.",
            fix=f"SafeConfig({name}={getattr(SafeConfig, name)!r})",
        )
