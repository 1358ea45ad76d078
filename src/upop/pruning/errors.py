"""The errors of the method. Each says what was asked, what was found and what to do."""


class UPopError(Exception):
    """Base of every error that this library raises on purpose."""


class SettingError(UPopError, ValueError):
    """A setting is out of its range, misspelt, or contradicts another one."""


class LayoutError(UPopError, ValueError):
    """The model has no group that can be pruned as asked, or cannot be traced."""


class StepError(UPopError, RuntimeError):
    """A search step was called at the wrong moment: too late, too early, or without gradients."""


class PlanError(UPopError, ValueError):
    """A plan does not fit the model it is applied to."""


class VerificationError(UPopError, RuntimeError):
    """The shrunken model does not compute what the masked one does; the model is restored."""


def some_of(names: "list[str] | tuple[str, ...]", most: int = 8) -> str:
    """Return the first names, joined, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to `name`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
