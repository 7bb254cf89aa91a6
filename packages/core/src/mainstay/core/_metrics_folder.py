"""The folder in which the processes of one service put their metrics together, looked at before any metric is made.

prometheus-client opens files in it while packages are imported. Without the folder that import would end with a file
that is missing and a name that says nothing, so it is looked at here, which every package imports first.
"""

from __future__ import annotations

import os
from pathlib import Path

from mainstay.core.errors import ConfigurationError

__all__ = ["check_folder"]

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def check_folder() -> None:
    """Refuse a folder that cannot be used, if the environment names one.

    Raises:
        ConfigurationError: it is no folder, or cannot be written to.
    """
    value = os.environ.get(_VARIABLE)
    if value is None:
        return
    if not value:
        msg = f"{_VARIABLE} is empty: unset it, or name a folder that is empty when the service starts"
        raise ConfigurationError(msg)
    folder = Path(value)
    if not folder.is_dir():
        msg = f"{_VARIABLE} names {value}, which is no folder: make it, empty, before the service starts"
        raise ConfigurationError(msg)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        msg = f"{_VARIABLE} names {value}, in which this process may not write: give its account the right to"
        raise ConfigurationError(msg)
