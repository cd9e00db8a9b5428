"""Every error that paci raises on purpose.

::

    PaciError                     anything paci itself reports
    ├── ConfigError (ValueError)  what the user asked for cannot be done
    │   ├── ScheduleError         a schedule's program is not legal
    │   ├── DataError             a corpus or tokenizer is missing, invalid or too short
    │   └── CheckpointError       a checkpoint is missing, damaged, or of another model
    ├── DriftError                a run saw other weight versions than its program says
    └── WorkerError               a worker died, or a wait passed its time-out

Each message is one line that says what must hold, what was found instead, and what to do.
"""


class PaciError(Exception):
    """Base of every error that paci raises on purpose.

    ``exit_code`` is the exit status of the command line: 1 for a failure at run time, 2 for a
    request that cannot be met.
    """

    exit_code = 1


class ConfigError(PaciError, ValueError):
    """What the user asked for cannot be done; the message says what can."""

    exit_code = 2


class ScheduleError(ConfigError):
    """A schedule's program breaks a rule; ``check`` draws the grid with the culprit marked."""


class DataError(ConfigError):
    """A corpus, a tokenizer or a request for batches is missing, unreadable or out of range."""


class CheckpointError(ConfigError):
    """A checkpoint is missing, damaged, or belongs to another model or run."""


class DriftError(PaciError):
    """A run met other weight versions than its program predicts; this is always a bug."""


class WorkerError(PaciError):
    """A worker died, a wait passed its time-out, or a pipeline that failed was used again."""
