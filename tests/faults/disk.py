"""A small ext4 on a loop device with simulated power cuts: data without fsync is lost after the next mount."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2


def why_not() -> str:
    """Return why this machine cannot simulate a disk; empty if it can."""
    if os.geteuid() != 0:
        return "only root can mount a loop device"
    if not (shutil.which("mkfs.ext4") and shutil.which("losetup") and Path("/dev/loop-control").exists()):
        return "mkfs.ext4, losetup or /dev/loop-control is absent"
    return ""


class Disk:
    """An ext4 of `size_mb` in `folder`, mounted at `self.path` until `close`. Raises `OSError` if it cannot be mounted."""

    def __init__(self, folder: Path, size_mb: int = 48) -> None:
        self.image, self.path = folder / "disk.img", folder / "disk"
        self.path.mkdir()
        with self.image.open("wb") as f:
            f.truncate(size_mb << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.image)], check=True)
        self.mount()

    def mount(self) -> None:
        done = subprocess.run(
            ["mount", "-o", "loop", str(self.image), str(self.path)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(done.stderr.strip())

    def cut(self) -> None:
        """Cut the power: nothing more reaches the disk, not even the journal."""
        fd = os.open(self.path, os.O_RDONLY)
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        os.close(fd)

    def again(self) -> None:
        """Mount the disk again, as after a power cut."""
        self.close()
        self.mount()

    def close(self) -> None:
        subprocess.run(["umount", str(self.path)], check=False)
