"""Read a processor's config: known keys only, each documented in the processor's CONFIG_KEYS."""

import difflib


def read_config(processor: type, cfg) -> dict:
    """The keys that `cfg` (mapping or None) sets, without `name`. Raises ValueError on an unknown key."""
    given = {key: cfg[key] for key in cfg if key != "name" and cfg[key] is not None} if cfg else {}
    for key in given:
        if key not in processor.CONFIG_KEYS:
            near = difflib.get_close_matches(key, processor.CONFIG_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(processor.CONFIG_KEYS)}"
            raise ValueError(f"{processor.NAME}: unknown key {key}; {hint}")
    return given
