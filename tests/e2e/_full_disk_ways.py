"""Whether a process may have mounts of its own, and how."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

__all__ = ["OWN_MOUNTS", "may_mount"]

OWN_MOUNTS = ["unshare", "--mount"]
if hasattr(os, "geteuid") and os.geteuid() != 0:
    OWN_MOUNTS.append("--map-root-user")


def may_mount() -> bool:
    """Linux lets root do it, and others where user namespaces are allowed."""
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return False
    command = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
