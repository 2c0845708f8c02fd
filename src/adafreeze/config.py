"""SafeConfig: every setting of a run in one validated dataclass."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from .decide.policy import POLICIES
from .decide.scores import SCORES
from .errors import ConfigError
from .sizes import parse_size

__all__ = ["AS_PUBLISHED", "AT_START", "PAPER", "SafeConfig"]

# The share of the blocks that is frozen before step 0, unless something else is said.
AT_START = 1 / 3
# What we have added to when and how units freeze, switched off: for methods as others published them.
AS_PUBLISHED: dict[str, Any] = {"freeze_at_start": 0.0, "lr_scale": 1.0, "wait_for_loss": False}
# What the published method has other than our defaults; it leaves the warm-up's length open, and this is our reading.
PAPER: dict[str, Any] = {"policy": "threshold", "warmup": 0.3, "ramp_end": 0.5, **AS_PUBLISHED}

_T = TypeVar("_T")


def _knows_what_was_given(cls: type[_T]) -> type[_T]:
    """Let a frozen dataclass keep the names of the arguments that it was made with.

    Around ``__init__``, and not in ``__new__``, which copies and pickles call without arguments, and which would hide
    the signature.
    """
    make: Any = cls.__init__
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        object.__setattr__(self, "_given", frozenset({*names[: len(args)], *kwargs}))

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


@_knows_what_was_given
@dataclass(frozen=True)
class SafeConfig:
    """Settings of selective adapter freezing. The defaults need no tuning.

    Shares of the run are fractions of ``total_steps``, between 0 and 1.

    Args:
        policy: which units freeze next. ``"share"`` (default) freezes the longest prefix whose scores sum to at
            most ``freeze_share`` of the total; ``"threshold"`` every unit whose score is below τ(t), the paper's rule
            (with the rest of its settings: ``SafeConfig.paper()``); ``"bottom_up"`` freezes ``freeze_share`` of the
            blocks with adapters, from the bottom; or a function of a ``PolicyInput`` that returns unit names.
        score: how a unit's importance is measured: ``"cka"`` (default), ``"cka_debiased"``, ``"local_cka"``,
            ``"grad_norm"``, ``"weight_change"``, ``"random"``, or a function of two tensors of shape
            (tokens, features): the unit's representation before (pre-trained) and now.
        granularity: ``"block"``: all adapters of a transformer block are one unit; ``"site"``: each adapted layer
            is its own.
        freeze_share: the part of the total score that may be frozen by the end of the ramp.
        threshold: τ_T of the paper, the score below which units freeze at the end of the ramp.
        warmup: the share of the run before the first freeze by score; it ends sooner once the scores have settled.
        wait_for_loss: let the warm-up go on, at most to ``ramp_end``, while the training loss falls faster than it has
            on average: what has not moved yet may still be about to. Needs a model that returns its loss.
        ramp_end: the share of the run at which the threshold stops rising (t_f).
        settle_patience: scores have settled when the policy's choice has not changed over this many measurements.
        settle_tolerance: ... and no score moved by more than this fraction of the largest.
        min_live_blocks: blocks that always keep training.
        probe_tokens: tokens on which scores are measured. More is steadier and costs more; shrunk automatically
            if ``min_measurements`` of them would cost more than ``overhead``.
        normalize_rows: scale each token's vector to unit length before CKA, so that a few huge tokens (attention
            sinks of decoders) cannot drown all others.
        min_measurements: measurements between the start and ``ramp_end``, at least.
        overhead: the share of the run's FLOPs that measuring may cost.
        cache: where the outputs of the frozen prefix are kept, so that a sample that comes again starts above it:
            ``"auto"`` (default) in memory, then on disk if ``cache_dir`` is given, and nowhere if it cannot pay;
            ``"ram"``, ``"disk"``, or ``"off"``.
        cache_budget: the most that the cache holds in memory, and the most that it holds on disk: bytes, or a text
            such as ``"4GiB"``. Of memory it never takes more than half of what is free.
        cache_dir: folder of the disk tier; of this machine, since a network file system is no place for it. For
            ``cache="disk"`` the default is ``adafreeze`` in the user's cache folder.
        cache_dtype: ``"bfloat16"`` keeps cached outputs in half the bytes, rounded; None as the blocks give them.
        prefix_dropout: keep the model's dropout in the frozen prefix. Its outputs are then random, and the cache is
            off.
        lr_scale: what the learning rates are multiplied by, while the optimizer steps, once units have frozen.
            ``"sqrt"`` (default): √(units / live units), at most 3, which keeps a step of Adam's as long as it was
            with all of them; a number; 1 leaves them alone. Units that were frozen before step 0 do not count.
        memory_budget: the most that a training step may hold on the device, weights included, from the first step
            on: bytes, a text such as ``"6GiB"``, a share of the device such as 0.5, or ``"auto"`` for what is free.
            Blocks above the prefix recompute their activations as far as that takes. None (default): the peak of
            the run is that of its first steps.
        dry_run: log what would freeze, freeze nothing.
        freeze_at_start: the share of the blocks with adapters, rounded down, that is frozen before step 0, from the
            bottom, whatever would become of their scores: the peak falls from the first step on, and the cache fills in
            the first epoch. None (default): a third; none if ``freeze`` or another policy than "share" says what
            freezes, if ``freeze_share`` is 0, or for AdaLoRA, whose ranks could then never move.
        freeze: unit names to freeze by hand, at once.
        seed: of the probe's own random generator; the run's random state is never advanced.

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
    cache_dtype: str | None = None
    prefix_dropout: bool = False
    lr_scale: float | str = "sqrt"
    memory_budget: int | float | str | None = None
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
        _named("cache_dtype", self.cache_dtype, (None, "bfloat16"))
        parse_size("SafeConfig.cache_budget", self.cache_budget)
        if self.memory_budget is not None:
            _memory_budget(self.memory_budget)
        if self.cache_dir is not None and not isinstance(self.cache_dir, (str, os.PathLike)):
            raise ConfigError(
                f"SafeConfig.cache_dir is {self.cache_dir!r}.",
                cause="It must be the path of a folder.",
                fix='SafeConfig(cache_dir="cache")',
            )
        if self.cache_dir is not None and self.cache in ("ram", "off"):
            raise ConfigError(
                f"SafeConfig.cache_dir is given, and cache is {self.cache!r}.",
                cause="Nothing would be written to that folder.",
                fix='SafeConfig(cache="disk", cache_dir=...), or cache="auto" for memory first',
            )
        for name in ("wait_for_loss", "normalize_rows", "prefix_dropout", "dry_run"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"SafeConfig.{name} is {getattr(self, name)!r}.",
                    cause="It must be True or False.",
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
                    f"SafeConfig.{name} is {value!r}.",
                    cause=f"It must be a whole number, at least {least}"
                    + ("." if most == math.inf else f" and at most {most}."),
                    fix=f"SafeConfig({name}={max(least, getattr(type(self), name))})",
                )
        if self.ramp_end < self.warmup:
            raise ConfigError(
                f"SafeConfig.ramp_end ({self.ramp_end}) is before warmup ({self.warmup}).",
                cause="The threshold rises from the end of the warm-up to ramp_end.",
                fix=f"SafeConfig(warmup={max(0.0, self.ramp_end - 0.2):g}, ramp_end={self.ramp_end})",
            )

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that were given, to the class, ``from_dict`` or as flags; the others are defaults.

        A resumed run takes these from here and the others from its checkpoint.

        >>> sorted(SafeConfig(freeze_share=0.6, seed=1).given)
        ['freeze_share', 'seed']
        """
        given: frozenset[str] = vars(self).get("_given", frozenset())
        return given

    def changed(self, **fields: Any) -> SafeConfig:
        """A copy with other values of some fields, by adafreeze itself: what was given stays what it was.

        ``dataclasses.replace`` gives every field.

        >>> SafeConfig(seed=1).changed(cache="off").given
        frozenset({'seed'})
        """
        config = dataclasses.replace(self, **fields)
        object.__setattr__(config, "_given", self.given)
        return config

    @property
    def share_at_start(self) -> float:
        """``freeze_at_start``, and what None stands for."""
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
        """The method as published: the cubic threshold on raw scores, units frozen wherever they stand."""
        return cls.from_dict({**PAPER, **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SafeConfig:
        """Build from a mapping, naming any field that does not exist."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"SafeConfig has no field {name!r}.",
                    cause=f"Its fields are: {', '.join(known)}.",
                    fix=f"Remove {name!r}, or correct its spelling.",
                )
        return cls(**dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the journal; functions by their name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("policy", "score"):
            if callable(values[name]):
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
            f"SafeConfig.{name} is {value!r}.",
            cause=f"It must be one of {', '.join(map(repr, known))}.",
            fix=f"SafeConfig({name}={getattr(SafeConfig, name)!r})",
        )


def _one_of(name: str, value: Any, known: Any) -> None:
    if (callable(value) and name != "granularity") or (isinstance(value, str) and value in known):
        return
    raise ConfigError(
        f"SafeConfig.{name} is {value!r}.",
        cause=f"It must be one of {', '.join(sorted(known))}" + ("." if name == "granularity" else ", or a function."),
        fix=f'SafeConfig({name}="{getattr(SafeConfig, name)}")',
    )


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, Iterable) and not isinstance(value, str):  # which is iterable too, letter by letter
        names = tuple(value)
        if all(isinstance(one, str) for one in names):
            return tuple(dict.fromkeys(names))
    raise ConfigError(
        f"SafeConfig.{name} is {value!r}.",
        cause="It must be a list of unit names.",
        fix=f"SafeConfig({name}=[{value if isinstance(value, str) else '...'!r}])",
    )


def _within(name: str, value: Any, low: float, high: float, also: str = "") -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ConfigError(
            f"SafeConfig.{name} is {value!r}.",
            cause=f"It must be a number between {low} and {high}{also}.",
            fix=f"SafeConfig({name}={getattr(SafeConfig, name)!r})",
        )
