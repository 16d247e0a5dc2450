"""Python's garbage collector under an engine: it skips objects that stay, since each pause stops all threads."""

from __future__ import annotations

import atexit
import gc

_NEW = 10_000  # objects between two looks at the new ones: a large body then causes no look through everything
_LOADS = 8  # adapters, some ten thousand objects, that are frozen together: a pause of a few milliseconds


class GcFreeze:
    """Freezer of the process's objects, so that Python's garbage collector skips them.

    Loaded adapters are hundreds of thousands of objects. Frozen ones are still freed when nothing refers to them,
    except for reference cycles, which `rest` finds. Nothing happens before `start` or after `stop`. Only the process's
    engine, on its own thread, may call these.
    """

    def __init__(self) -> None:
        self._is_on = False
        self._n_loads, self._n_freezes = 0, 0
        self._thresholds = gc.get_threshold()

    def start(self) -> None:
        """Freeze all current objects, and let the collector run less often on new ones."""
        self._is_on = True
        self._thresholds = gc.get_threshold()
        gc.set_threshold(max(_NEW, self._thresholds[0]), *self._thresholds[1:])
        self._freeze()
        self._n_freezes = 0
        atexit.register(gc.unfreeze)  # what is still frozen when the program ends counts as leaked elsewhere

    def stop(self) -> None:
        """Return all objects to the collector."""
        if self._is_on:
            self._is_on = False
            atexit.unregister(gc.unfreeze)
            gc.unfreeze()
            gc.set_threshold(*self._thresholds)

    def settle(self) -> None:
        """Count a loaded adapter. Freeze the objects of all adapters loaded since the last freeze."""
        self._n_loads += self._is_on
        if self._n_loads >= _LOADS:
            self._freeze()

    def rest(self) -> None:
        """Run the garbage collector on all objects, also on frozen ones, if any were frozen since the last call.

        Call it when there is no work.
        """
        if self._is_on and self._n_freezes:
            gc.unfreeze()
            self._freeze()
            self._n_freezes = 0

    def _freeze(self) -> None:
        gc.collect()
        gc.freeze()
        self._n_loads, self._n_freezes = 0, self._n_freezes + 1
