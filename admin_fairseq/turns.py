"""Threads of which one runs at a time, in turn."""

from __future__ import annotations

import threading
from typing import Callable, Sequence


class Turns:
    """Runs functions in threads of which only one runs at a time; :meth:`next` hands over to the next.

    So several batches go through the model in step, sub-layer by sub-layer, their statistics pooled as if
    they were one batch, in an order that is always the same (dropout draws from one random generator).
    """

    def __init__(self, functions: Sequence[Callable[[], None]]) -> None:
        self.functions = functions
        self.now = 0
        self._error: BaseException | None = None
        self._may_run = [threading.Semaphore(0) for _ in functions]

    def run(self) -> None:
        if len(self.functions) == 1:  # next() then gives the turn back to its caller
            return self.functions[0]()
        threads = [
            threading.Thread(target=self._thread, args=(number,), daemon=True) for number in range(len(self.functions))
        ]
        for thread in threads:
            thread.start()
        self._may_run[0].release()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def next(self) -> None:
        me = self.now
        self._hand_over()
        self._may_run[me].acquire()
        if self._error is not None:
            raise self._error

    def _thread(self, number: int) -> None:
        self._may_run[number].acquire()
        try:
            if self._error is None:
                self.functions[number]()
        except BaseException as error:  # run() raises it in the caller's thread
            self._error = error
        self._hand_over()

    def _hand_over(self) -> None:
        self.now = (self.now + 1) % len(self.functions)
        self._may_run[self.now].release()
