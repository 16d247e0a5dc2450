"""Every kernel against its peer in one run: 4-bit codec and products against bitsandbytes, training ops against torch.

Both sides are compared before they are timed, A B A B, medians. The bound of an op is the larger of what its bytes take
at the rate of a copy and its products at the rate of torch's matrix product, both measured in the same run.

    python bench/kernels.py [--threads 2] [--rows 1536] [--columns 576] [--repeats 9] [--only 4-bit|training]
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def stand_aside() -> None:
    """Give this module's name to the package `kernels` of PyPI, where it is installed.

    A script finds its own folder first, so that libraries which ask for that package in another script of this folder
    would be given this file.
    """
    here = Path(__file__).parent.resolve()
    spec = PathFinder.find_spec(__name__, [place for place in sys.path if Path(place).resolve() != here])
    if spec is not None and spec.loader is not None:
        package = sys.modules[__name__] = module_from_spec(spec)
        spec.loader.exec_module(package)


if __name__ == "__main__":
    from kernel_table import main

    main(__doc__)
else:
    stand_aside()
