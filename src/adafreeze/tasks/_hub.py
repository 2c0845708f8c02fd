"""Why the Hugging Face Hub did not give what was asked for, read off the chain of its errors."""

from __future__ import annotations

__all__ = ["first_line", "hub_reason"]

# By class name along the chain: the classes live in four packages (huggingface_hub, datasets, httpx or
# requests, the socket layer) and moved between their versions.
_MISSING = {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}
_GATED = {"GatedRepoError", "DatasetsServerError"}
_UNREACHABLE = {
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "TimeoutException",
    "gaierror",
}


def hub_reason(error: BaseException) -> str | None:
    """``"missing"``, ``"gated"``, ``"unreachable"``, or None where the Hub is not the reason."""
    names: set[str] = set()
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        names |= {kind.__name__ for kind in type(current).__mro__}
        current = current.__cause__ or current.__context__
    for reason, kinds in (("gated", _GATED), ("missing", _MISSING), ("unreachable", _UNREACHABLE)):
        if names & kinds:
            return reason
    return None


def first_line(error: BaseException) -> str:
    """The first line of the innermost message: what the library found, without its advice."""
    messages: list[str] = []
    current: BaseException | None = error
    while current is not None and len(messages) < 8:
        if str(current).strip():
            messages.append(str(current).strip().splitlines()[0])
        current = current.__cause__
    return messages[-1] if messages else type(error).__name__
