"""Where a result came from: versions, device, code revision."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from knife_jax.cores import compiler_options, training_options


def environment_facts(samples: int = 0) -> dict[str, Any]:
    """What a result file must say about where it came from: versions, device, processor, code revision.

    Args:
        samples: `Plan.samples_per_update` of what was trained, which settles how it was compiled.
    """
    packages = ("knife-jax", "jax", "jaxlib", "flax", "optax", "distrax", "jaxmarl", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "processor": platform.processor() or platform.machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compiler_options": compiler_options() | training_options(samples),
        "revision": _revision(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The git commit of this source tree, marked if it has uncommitted changes; None outside a checkout."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        is_ours = Path(git("rev-parse", "--show-toplevel")).resolve() == package.parent
        return git("describe", "--always", "--dirty", "--abbrev=12") if is_ours else None
    except (OSError, subprocess.SubprocessError):
        return None
