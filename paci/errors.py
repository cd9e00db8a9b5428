"""Every error that paci raises on purpose.

::

    PaciError                     anything paci itself reports
    ├── ConfigError (ValueError)  what the user asked for cannot be done
    │   ├── ScheduleError         a schedule's program is not legal
    │   ├── DataError             a corpus is missing, empty or too short
    │   └── CheckpointError       a checkpoint is damaged, or of another model
    ├── DriftError                a run saw other weight versions than its program says
    └── WorkerError               a worker died, or a wait passed its time-out

A message is one line: what must hold, what was got, what to do.
"""


class PaciError(Exception):
    """Base of every error that paci raises on purpose.

    ``exit_code`` is what the command line exits with: 1 for a failure at run time, 2 for a
    request that cannot be met.
    """

    exit_code = 1


class ConfigError(PaciError, ValueError):
    """What the user asked for cannot be done; the message says what can."""

    exit_code = 2


class ScheduleError(ConfigError):
    """A schedule's program breaks a rule; the message holds the grid with the culprit marked."""


class DataError(ConfigError):
    """A corpus is missing, empty, or shorter than what is asked of it."""


class CheckpointError(ConfigError):
    """A checkpoint is missing, damaged, or belongs to another model or run."""


class DriftError(PaciError):
    """A run met other weight versions than its program predicts: a bug, never to be ignored."""


class WorkerError(PaciError):
    """A worker died or a wait passed its time-out; names rank, stage, micro-batch and action."""
