"""Rows of Parquet files, the form in which the Hugging Face Hub keeps most data sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evolkv.errors import TaskError
from evolkv.tasks.rows import Place


def parse_parquet(path: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield the place and the fields of every row; the counterpart of `parse_rows`.

    Raises:
        TaskError: pyarrow is not installed, the file is missing or no Parquet, or it has no rows.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise TaskError(f"{path} is a Parquet file, which needs pyarrow; pip install 'evolkv[parquet]'") from None
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        what = "is a folder; give the path of a file" if file.is_dir() else "does not exist; check the path"
        raise TaskError(f"file {path} {what}")
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield (number, f"{path} row {number}"), fields
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TaskError(f"{path} cannot be read as Parquet: {reason}; fetch it again") from None
    if number == 0:
        raise TaskError(f"{path} has no rows; expected one problem in each")
