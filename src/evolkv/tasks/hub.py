"""Data sets on the Hugging Face Hub: fetched once, then read from the Hub's own cache."""

from __future__ import annotations

import logging

from evolkv.errors import TaskError

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 10


def hub_file(repository: str, file: str, task: str, instead: str) -> str:
    """Return the path of a data set's file in the Hub's cache, fetched if it is not there.

    Args:
        repository: the data set, as ``owner/name``.
        file: path within it.
        task: name of the task that needs it, for messages.
        instead: what the user may do where there is no network, for messages: "give path= …".

    Raises:
        TaskError: the Hub has no answer, or no such file.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file, repo_type="dataset")
    if isinstance(cached, str):
        return cached
    logger.info("fetching %s of %s from the Hugging Face Hub", file, repository)
    try:
        # Ask once, with a time limit: the download itself would try for half a minute.
        HfApi().dataset_info(repository, timeout=_TIMEOUT_SECONDS)
        return hf_hub_download(repository, file, repo_type="dataset")
    except Exception as error:  # the Hub client's own errors, its transport's, or the disk's
        raise TaskError(
            f"{task}: {file} of {repository} cannot be fetched from the Hugging Face Hub ({type(error).__name__}); "
            f"{instead}"
        ) from error
