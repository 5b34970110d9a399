"""Files that come with the program, found from any working directory: configurations, cluster files, dashboards."""

from __future__ import annotations

from pathlib import Path

from orchestrator.refusal import ConfigError

_JOBS = Path(__file__).parent
_FOLDERS = {"configs": _JOBS / "configs", "cluster": _JOBS / "cluster", "dashboards": _JOBS.parent / "dashboards"}
_NO_FILES = {".py", ".pyc"}


def configurations() -> dict[str, str]:
    """Paths, by the name that `--config` takes."""
    return {path.stem: str(path) for path in sorted(_FOLDERS["configs"].glob("*.yaml"))}


def files() -> dict[str, str]:
    """Absolute paths of all files, by name: `configs/tiny.yaml`, `cluster/rayjob.yaml`, `dashboards/prometheus.yml`."""
    return {f"{name}/{path.relative_to(folder).as_posix()}": str(path) for name, folder in _FOLDERS.items()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in _NO_FILES}


def configuration_file(given: str) -> str:
    """The file that `--config` means: the one of that path; where there is none, the packaged configuration of that name.

    Raises ConfigError: there is neither.
    """
    path, packaged = Path(given), configurations()
    if path.exists() and not path.is_dir():
        return given
    if given.removesuffix(".yaml") in packaged:
        return packaged[given.removesuffix(".yaml")]
    if path.is_dir():
        return given  # refused as any folder is
    raise ConfigError("--config", given, "a readable YAML file (No such file or directory), or the name of a configuration that "
                                         f"comes along: {', '.join(packaged)}")
