"""`python -m jobs.config [KEY]`: every key of the configuration, or one, or a section, with type, default, unit and meaning.

`--json` for programs; `--markdown` is docs/configuration.md. `--file` names the files that come with the program, and tells the
path of one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from jobs import cli, packaged
from orchestrator.config.reference import Key, Keys, look_up, sections
from orchestrator.refusal import ConfigError

INTRODUCTION = """# Configuration

<!-- Made by `python -m jobs.config --markdown > docs/configuration.md`; meanings stand at the keys, in orchestrator/config/. -->

A run has one configuration: a YAML file with the sections below (`--config`), changed key by key on the command line
(`--set section.key=value`, repeatable; the value is YAML, so `[1, 2]`, `null` and `{pool: train}` are too). Whatever is not given
has its default. `dualray config` prints what stands here, `dualray config KEY` one key or section, `--json` the same for programs.

`--config` takes a path, relative ones from the working directory. Where there is no file of that path, it takes the name of a
configuration that comes with the program: %(configurations)s, with or without `.yaml`.
Where there is neither it is refused, with these names. A file of the working directory goes before a configuration of its name.
`dualray config --file` lists all files that come along, `dualray config --file NAME` prints the path of one.

- Nothing is repaired or guessed. An unknown key, a wrong type, a value out of range or keys that contradict each other end the
  command with exit code 2, before anything starts, and one line that names key, value and what is allowed.
- `auto` is a value like others: it is settled when the run starts, against the nodes that there are.
- `null` is none. Numbers take exponents as people write them (`3e-4`). A date is text.
- "must be given" is said of keys inside a section that is null unless it is written.
- What a run was told, with all defaults, is `config.yaml` in its folder.
- Keys under `model` are those of DeepSeek-V3's `config.json`, with the same meaning; "report" is DeepSeek-V3's.
"""
EXAMPLES = ("schedule", "training.steps --json")


def main() -> int:
    """Raises ConfigError, UsageError: refused."""
    parser = cli.Parser(prog=cli.program("config"), examples=EXAMPLES,
                        description="Every key of the run configuration: type, default, unit, meaning.")
    parser.add_argument("key", metavar="KEY", nargs="?", help="a key, as section.key, or a section (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print docs/configuration.md")
    form.add_argument("--file", metavar="NAME", nargs="?", const="", help="print the path of a file that comes along; without NAME "
                      "the names of all: configurations, cluster files, dashboards")
    options = parser.parse_args()
    if options.key is not None and (options.markdown or options.file is not None):
        raise cli.UsageError(f"{parser.prog}: KEY = {options.key}: nothing, with {'--markdown' if options.markdown else '--file'}")
    if options.file is not None:
        print(_files(options.file))
        return cli.DONE
    found = sections() if options.key is None else look_up(options.key)
    print(as_json(found) if options.json else markdown() if options.markdown else text(found))
    return cli.DONE


def text(found: tuple[Keys, ...]) -> str:
    """For a person at a terminal."""
    lines = []
    for section in found:
        lines += [f"{section.name}: {section.meaning}", ""]
        for key in section.keys:
            unit = f", in {key.unit}" if key.unit else ""
            lines += [f"  {key.name}", f"      {key.meaning}", f"      {key.type}{unit}; {_default(key)}"]
        lines.append("")
    return "\n".join(lines[:-1])


def as_json(found: tuple[Keys, ...]) -> str:
    """Keys in order, each with its section; `default` is null where `required`."""
    return json.dumps({"sections": {section.name: section.meaning for section in found},
                       "keys": [vars(key) for section in found for key in section.keys]})


def markdown() -> str:
    """The whole of docs/configuration.md, without its last line end."""
    names = ", ".join(f"`{name}`" for name in packaged.configurations())
    lines = [INTRODUCTION % {"configurations": names}]
    for section in sections():
        lines += [f"## {section.name}", "", _cell(section.meaning), "", "| key | type | default | unit | meaning |",
                  "| --- | --- | --- | --- | --- |"]
        for key in section.keys:
            default = "must be given" if key.required else f"`{_value(key.default)}`"
            cells = (f"`{key.name}`", key.type, default, key.unit, key.meaning)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def _default(key: Key) -> str:
    return "must be given" if key.required else f"default {_value(key.default)}"


def _value(value: Any) -> str:
    """As it would stand in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _cell(written: str) -> str:
    return written.replace("|", "\\|").replace("\n", " ")


def _files(name: str) -> str:
    """Raises ConfigError: there is none of that name."""
    found = packaged.files()
    if not name:
        return "\n".join(found)
    if name not in found:
        raise ConfigError("--file", name, f"one of {', '.join(found)}")
    return found[name]


if __name__ == "__main__":
    sys.exit(cli.run(main))
