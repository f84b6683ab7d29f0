"""Python's wall clock, ahead of the true one by as many seconds as a file says; its other clocks as they are.

Python imports a module of this name when it starts; `faults.clock` puts the folder into PYTHONPATH and sets the clock.
"""

import datetime
import os
import time

OFFSET = "FAULTS_CLOCK_OFFSET"
"""Environment variable: the file."""

_time, _time_ns = time.time, time.time_ns


def ahead() -> int:
    with open(os.environ[OFFSET]) as file:
        return int(file.read())


class Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "Datetime":
        return super().now(tz) + datetime.timedelta(seconds=ahead())

    @classmethod
    def utcnow(cls) -> "Datetime":
        return super().utcnow() + datetime.timedelta(seconds=ahead())


time.time = lambda: _time() + ahead()
time.time_ns = lambda: _time_ns() + ahead() * 10**9
datetime.datetime = Datetime  # type: ignore[misc]
