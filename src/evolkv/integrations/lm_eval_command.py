"""``evolkv-lm-eval``: the command ``lm_eval`` of lm-evaluation-harness, with the model ``evolkv`` registered."""

from __future__ import annotations

import importlib

from evolkv.cli import console
from evolkv.errors import EvolKVError, RunError


def main() -> int:
    """Run the harness with the arguments of the process.

    Returns:
        The exit code: 0 if all went well, 1 for a failed run, 2 for bad usage or input. Errors of the harness itself
        leave as the harness has them leave.
    """
    console.prepare()
    try:
        importlib.import_module("evolkv.integrations.lm_eval")  # registers the model
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except EvolKVError as error:
        code = 1 if isinstance(error, RunError) else 2
        console.fail(str(error), code)
        return code
    return 0
