"""Signals and time limits: a run that is asked to stop finishes its step, and nothing is lost."""

import contextlib
import os
import signal
import threading
import time

#: Seconds after which a step that has not ended is given up; the run then goes on from its last checkpoint.
PATIENCE = 6.0

#: Seconds within which a second signal is taken for the first: `uv run` and batch systems deliver the same one twice.
ECHO = 0.2


class Stopped(BaseException):
    """The run ends here. whole: no step was given up half done.

    No Exception, so that nothing on the way takes it for an error that it can handle.
    """

    def __init__(self, whole: bool):
        super().__init__()
        self.whole = whole


class Interruption:
    """What Ctrl-C (SIGINT), SIGTERM, a lost terminal (SIGHUP) and a time limit do while the block runs.

    The first sets `exit_code` (130, 143, 129; 143 for the time limit), which is looked at after every step. While
    `at_once()` says that nothing is half done, Stopped is raised there and then; after PATIENCE seconds it is raised
    wherever the run is. Within `finishing()`, nothing is raised. A second signal, ECHO seconds later, ends the process.

    Args:
        minutes: the time limit, counted from here; 0 for none.

    Only the main thread can handle signals; elsewhere the block does nothing.
    """

    def __init__(self, minutes: float = 0):
        self.minutes = minutes
        self.exit_code = 0
        self.at_once = lambda: True
        self._finishing = False
        self._asked_at = 0.0

    def __enter__(self):
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGALRM]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
            signal.setitimer(signal.ITIMER_REAL, self.minutes * 60)
        return self

    def __exit__(self, *error):
        if self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.exit_code:  # an echo must not meet the former handlers
            time.sleep(max(0.0, self._asked_at + ECHO - time.monotonic()))
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if not self.exit_code:
            self.exit_code = 128 + (signal.SIGTERM if number == signal.SIGALRM else number)
            self._asked_at = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1)  # again and again: a finaliser may swallow what is raised
            if not self._finishing and self.at_once():
                raise Stopped(whole=True)
        elif number != signal.SIGALRM:
            if time.monotonic() - self._asked_at < ECHO:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._finishing:
            raise Stopped(whole=self.at_once())

    def finish(self) -> None:
        """From now on nothing is given up any more."""
        self._finishing = True
        if self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def finishing(self):
        """Within it nothing is given up, however long it takes."""
        outer, self._finishing = self._finishing, True
        try:
            yield
        finally:
            self._finishing = outer
