"""From the text of a config and of --options to OmegaConf; what is no config is refused in one line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_evlgen.config.errors import ConfigError, one_line, shown
from lavis_evlgen.config.recipes import unknown

# of a config; far above what a person writes, far below what takes minutes to read
MOST_BYTES, MOST_VALUES, MOST_LEVELS = 2**20, 20_000, 20
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is not in every build of PyYAML
# ValueError: numbers of thousands of digits, `!!float abc`; RecursionError: values that hold themselves
_PARSING = (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError)


def read_file(path: Path) -> DictConfig:
    """The config file at `path`. Raises ConfigError for what cannot be read, is not YAML or not a mapping."""
    text = _text_of(path)
    try:
        _check_size(text, str(path))
        content = OmegaConf.load(io.StringIO(text))
    except OSError:  # OmegaConf's word for a number or true at the top
        content = None
    except _PARSING as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not YAML: {one_line(error)}") from error
    if not isinstance(content, DictConfig):
        kind = "a list" if OmegaConf.is_list(content) else "a single value"
        raise ConfigError(f"{path}: holds {kind}; a run config has the sections run, model, datasets")
    return content


def _text_of(path: Path) -> str:
    if not path.exists():
        raise ConfigError(f"--cfg-path: {path} does not exist (seen from {Path.cwd()}){unknown(path)}")
    if not path.is_file():
        raise ConfigError(f"--cfg-path: {path} is not a file; give the YAML file of a run config")
    try:
        content = path.read_bytes() if path.stat().st_size <= MOST_BYTES else None
    except OSError as error:
        raise ConfigError(f"--cfg-path: {path} cannot be read: {error.strerror or error}") from error
    if content is None:
        raise ConfigError(f"--cfg-path: {path} is larger than {MOST_BYTES:,} bytes; a run config is a short text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise ConfigError(f"{path}: not a text in UTF-8 ({byte}); a run config is a YAML file") from error


def _check_size(text: str, place: str):
    """Refuse texts that are small and grow: aliases (`*name`) of aliases, and values inside of values without end."""
    sizes: dict[str, int] = {}  # values below an anchor (`&name`), aliases counted as what they stand for
    opened: list[list] = [["", 0]]  # [anchor, values so far] of every collection that is not closed yet
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append([event.anchor, 1])
            if len(opened) > MOST_LEVELS:
                raise ConfigError(f"{place}: values inside of values, more than {MOST_LEVELS} levels deep")
            continue
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)  # an anchor that is not closed yet: YAML's parser names it
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
            sizes[anchor] = size
        elif isinstance(event, yaml.ScalarEvent):
            size = sizes[event.anchor] = 1
        else:
            continue
        opened[-1][1] += size
        if opened[-1][1] > MOST_VALUES:
            raise ConfigError(f"{place}: more than {MOST_VALUES:,} values, with what aliases (*name) stand for")


def read_options(options: list[str]) -> DictConfig:
    """`KEY=VALUE` texts of the command line. Raises ConfigError."""
    for option in options:
        if "=" not in option:
            raise ConfigError(f"--options {option}: write key=value, e.g. run.max_iters=100")
    for key, row in groupby(option.partition("=")[0] for option in options):
        if (count := len(list(row))) > 1:
            words = "quote values with braces or stars, or the shell makes several of them"
            raise ConfigError(f"--options: {key} is given {count} times in a row; {words}")
    found = OmegaConf.create()
    for option in options:
        try:
            _check_size(option.partition("=")[2], f"--options {shown(option)}")
            found.merge_with_dotlist([option])
        except ConfigError:
            raise
        except (*_PARSING, TypeError, AttributeError) as error:  # the last two: a key below one that holds a value
            raise ConfigError(f"--options {shown(option)}: {one_line(error)}") from error
    return found


def resolve_references(config: DictConfig, path: Path):
    """Put values in place of `${...}`, in place. Raises ConfigError that names the key, also for `???`."""
    for keys, text in list(_references(OmegaConf.to_container(config))):
        place, node, key = ".".join(map(str, keys)), config, keys[-1]
        for step in keys[:-1]:
            node = node[step]
        if OmegaConf.is_missing(node, key):
            raise ConfigError(f"{path}: {place} is ???, which means that a value must be given")
        if not OmegaConf.is_interpolation(node, key):
            continue
        try:
            value = node[key]
        except (OmegaConfBaseException, RecursionError) as error:
            words = one_line(error).partition(" full_key:")[0]
            raise ConfigError(f"{path}: {place}={shown(text)} refers to what cannot be read: {words}") from error
        # values that refer to values that refer on can grow without end
        if OmegaConf.is_config(value) and any(_references(OmegaConf.to_container(value))):
            words = "refers to a section that holds references itself; write the section out"
            raise ConfigError(f"{path}: {place}={shown(text)} {words}")
        node[key] = value


def _references(value, keys: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """(keys that lead there, text) of every text that may stand for something else."""
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _references(below, (*keys, key))
    elif isinstance(value, str) and ("${" in value or value == "???"):
        yield keys, value
