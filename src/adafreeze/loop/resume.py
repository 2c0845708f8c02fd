"""Resume: what a checkpoint keeps of a Safe, and how another one goes on from there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import note, warn
from .state import check_frozen, opened, packed_random_state, restore_random_state, sealed, settings_after

if TYPE_CHECKING:
    from .safe import Safe

__all__ = ["kept", "take_up"]

# After a change of these, scores of before and after cannot be compared.
OF_THE_SCORE = {"score", "granularity", "normalize_rows"}
# After a change of these, scores are measured at other steps.
OF_THE_SCHEDULE = {*OF_THE_SCORE, "warmup", "ramp_end", "probe_tokens", "min_measurements", "overhead", "seed"}


def kept(safe: Safe, *, random_state: bool = True) -> dict[str, Any]:
    """The state of ``safe``, sealed; with the random state of this rank, unless the host keeps it."""
    return sealed(
        {
            "steps": safe.steps,
            "settings": safe._asked.to_dict(),
            "length": safe.length.state_dict(*safe._seen),
            **safe._observer.state_dict(),
            "frozen": sorted(safe.frozen),
            "learning": sorted(safe._guard.learning),
            "probe": safe.decider.probe.digest(),
            "deciding": safe.decider.state_dict(),
            "cache": safe.cache.state_dict(),
            "budget": safe.budget.state_dict() if safe.budget is not None else None,
            "journal": safe.journal.mark(),
            "random": packed_random_state(safe.ranks.rank) if random_state else None,
        }
    )


def take_up(safe: Safe, state: Any) -> None:
    """Bring ``safe`` to where ``state`` was written; see ``Safe.load_state_dict``.

    Raises:
        RunError: the state is not whole, or of another model.
    """
    content = opened(state)
    config, differing = settings_after(safe._asked, content.get("settings"))
    taken = config is not safe._asked
    if config.granularity == safe.config.granularity:  # before anything changes
        check_frozen(content["frozen"], safe.units)
    if taken:
        safe._build_anew(config)
        check_frozen(content["frozen"], safe.units)
    if content.get("probe", safe.decider.probe.digest()) != safe.decider.probe.digest():
        warn(
            "The probe is another one than in the run that wrote the checkpoint.",
            cause="The train data, their order or SafeConfig(seed=, probe_tokens=) have changed.",
            fix="Resume with the same data, or pass probe= explicitly. Scores before and after are of two probes.",
        )
    safe.steps = content["steps"]
    safe._observer.load_state_dict(content)
    safe.journal.rewind(content.get("journal"))
    changes = safe.length.load_state_dict(content["length"], *safe._seen) if "length" in content else []
    frozen = dict.fromkeys([*content["frozen"], *safe._at_start])
    safe._guard.learning = safe.units.keys() & set(content.get("learning", ()))
    if not safe.frozen <= frozen.keys():
        safe._thaw(safe.frozen)  # a run that goes back to before a freeze
    safe.decider.load_state_dict(
        content["deciding"],
        safe.steps,
        other_schedule=bool(changes) or not differing.isdisjoint(OF_THE_SCHEDULE),
        other_score=not differing.isdisjoint(OF_THE_SCORE),
    )
    if changes:
        note(
            f"Resumed at step {safe.steps} with {', '.join(changes)}. The schedule is laid out anew from here: "
            f"{safe.decider.outlook(safe.steps)}."
        )
    if changes or differing or taken:
        safe.journal.write(
            "replan", step=safe.steps, total_steps=safe.total_steps, config=safe.config.to_dict(), length=changes
        )
    safe.cache.load_state_dict(content["cache"], other_length=bool(changes))
    if safe.decider.plan is not None:
        safe._announce()
    if safe.budget is not None and content["budget"] is not None:
        safe.budget.load_state_dict(content["budget"])
    safe._freeze([name for name in frozen if name not in safe.frozen], by="resume")
    restore_random_state(content.get("random"), safe.ranks.rank)
