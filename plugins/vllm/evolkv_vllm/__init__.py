"""Run EvolKV profiles inside vLLM: each layer keeps its budget of a prompt, and the other blocks go back to the pool.

vLLM loads `register` in every process that it starts. Nothing changes for a server without a profile.
"""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Install the hooks into vLLM; vLLM calls this through the entry point ``vllm.general_plugins``.

    Raises:
        RunError: a profile is asked for, and this vLLM is one that the plugin does not know.
    """
    # Imported here, because vLLM only logs what fails while a plugin is imported.
    from evolkv_vllm.hooks import install

    install()
