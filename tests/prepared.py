"""Imported last into the process that is forked.

Its machine is known, a run is planned once, and its objects are frozen, so that no child's collector looks at them.
"""

import gc

from known_machine import know_the_machine, plan_once

know_the_machine()
plan_once()
gc.collect()
gc.freeze()
