"""Imported last into the process that is forked.

Its machine is known, and its objects are frozen, so that no child's collector looks at them.
"""

import gc

from known_machine import know_the_machine

know_the_machine()
gc.collect()
gc.freeze()
