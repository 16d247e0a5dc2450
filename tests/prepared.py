"""Imported last into the process that is forked: its children train at once.

The machine is known, nothing is planned, and no picture is drawn, which together take longer than to train a tiny
model; the tests of these run in the test's own process. What a command reads from source is read. All objects are
frozen, so that no child's collector looks at them.
"""

import gc
import os

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from bare_runs import draw_nothing, plan_nothing
from known_machine import know_the_machine
from veneer.model.blueprint.registry import families_by_type
from veneer.recipe.known import declared
from veneer.recipe.tasks import TASKS

_, _, own_path = os.environ.pop("PYTHONPATH").partition(os.pathsep)  # the first place is that of this file
if own_path:
    os.environ["PYTHONPATH"] = own_path
know_the_machine()
plan_nothing()
draw_nothing()
families_by_type()
for task in TASKS:
    declared().settings(task)
get_checkpoint_conversion_mapping("llama")
gc.collect()
gc.freeze()
