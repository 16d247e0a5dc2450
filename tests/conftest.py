"""Array shapes and dtypes that the core and the kernel boundary declare are checked while the tests run.

Configs are left out: what a user may pass is checked by the configs themselves, and tested as such.
"""

from jaxtyping import install_import_hook

CHECKED = [
    "core.frozen",
    "core.linear",
    "core.records",
    "core.rows",
    "core.sites",
    "core.targets",
    "core.token_rows",
    "ops",
    "quant",
]

install_import_hook(
    [f"veneer.{name}" for name in CHECKED],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # an int is a float too
)
