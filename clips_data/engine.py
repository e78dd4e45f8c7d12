"""img2dataset's Reader and Downloader without the rest of img2dataset.

Importing the package runs its ``__init__``, which brings in OpenCV, albumentations, webdataset and two network checks:
seconds in every worker's parent, for parts that are not used here. So the package is entered into ``sys.modules``
unexecuted, and only the two modules that are needed are imported from it. Import this module in worker processes only.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


def downloader() -> Any:
    """img2dataset's ``Downloader`` class."""
    from img2dataset.downloader import Downloader

    return Downloader


def reader() -> Any:
    """img2dataset's ``Reader`` class."""
    from img2dataset.reader import Reader

    return Reader


def _enter_bare_package(name: str) -> None:
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is a dependency of clips and is not installed"
        sys.modules[name] = importlib.util.module_from_spec(spec)


_enter_bare_package("img2dataset")
