"""Pulls profiles from a registry into a folder for a server's --profiles-dir, which running servers follow.

```
<parent>/profiles -> .profiles.<digest>      a link, replaced at once
<parent>/.profiles.<digest>/                 every set that was pulled; an earlier one is a pull away
```
"""

import os
import shutil
from pathlib import Path

from export.bundle import BundleError, locked
from service.delivery.pull import Artefact, fetch_all
from service.profiles import files_in


def pull_profiles(source: Artefact, folder: Path) -> Path:
    """Pull profiles into a folder and point the link `folder` to it. Returns the folder.

    Raises BundleError when `folder` is not a link, SteeringError when a file is invalid, and DeliveryError.
    """
    if folder.exists() and not folder.is_symlink():
        raise BundleError(f"{folder} is not a link; allowed: a new name, or the link that an earlier pull made")
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.parent / f".{folder.name}.{source.digest.removeprefix('sha256:')[:16]}"
    with locked(folder.parent):
        if place.exists():
            fetch_all(source, source.files, place)  # compares only: no file is missing
        else:
            arriving = place.with_name(f"{place.name}.part")
            arriving.mkdir(exist_ok=True)
            fetch_all(source, source.files, arriving)
            try:
                files_in(arriving)
            except ValueError:
                shutil.rmtree(arriving)
                raise
            arriving.rename(place)
        link = folder.parent / f".{folder.name}.link"
        link.unlink(missing_ok=True)
        link.symlink_to(place.name)
        os.replace(link, folder)
    return place
