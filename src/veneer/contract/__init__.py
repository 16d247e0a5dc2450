"""The contract of a method: a frozen config with pure functions from parameters to a record. A config *is* its method.

Every method offers ``shapes``, ``init``, ``lower``, ``disk_names`` and ``dropout``. There is one contract for each kind
of place: `LinearMethod`, `ResidualMethod`, `PrefixMethod`, `PromptMethod`. All else is a capability that a config may
return:

- ``extras``: what else it trains (modules, biases, rows, parameters by name);
- ``training``: what it does while a run trains it (length of the run, a penalty, a schedule);
- ``packing``: how it is written, where others do not know the form that is trained;
- ``shared``: tensors that its layers share;
- ``checks``: what it refuses of a model's layers;
- ``late_start``: factors that may start again on the model, from data or from what quantizing has lost.

Laws, run on every method by ``tests/contract``:

- ``init`` returns exactly the names and shapes of ``shapes``, for any site, with finite values;
- ``lower`` is pure and differentiable, and where ``identity_at_start`` holds, the record of ``init`` changes nothing;
- for linear methods, forward through the record equals forward through the folded weight;
- what is saved and loaded is bit-equal, the declared bytes are the bytes on disk, and the records read from the file
  are those of the adapter on its model, bit for bit.
"""

from veneer.contract.config import MethodConfig
from veneer.contract.linear import LinearMethod
from veneer.contract.parameters import Params, Shapes
from veneer.contract.residual import ResidualMethod
from veneer.contract.targets import TargetedConfig
from veneer.contract.virtual_tokens import PrefixMethod, PromptMethod, VirtualTokenMethod

__all__ = [
    "LinearMethod",
    "MethodConfig",
    "Params",
    "PrefixMethod",
    "PromptMethod",
    "ResidualMethod",
    "Shapes",
    "TargetedConfig",
    "VirtualTokenMethod",
]
