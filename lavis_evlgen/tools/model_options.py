"""`--options` of commands that read only the model section."""

from __future__ import annotations

from omegaconf import OmegaConf

from lavis_evlgen.config import ConfigError


def model_options(options: list[str]) -> dict:
    """`model.KEY=VALUE` options as a dict of the model section."""
    wrong = next((option for option in options if not option.startswith("model.") or "=" not in option), None)
    if wrong is not None:
        raise ConfigError(f"--options {wrong}: give model.KEY=VALUE")
    # resolved here: a bundle holds plain values
    return OmegaConf.to_container(OmegaConf.from_dotlist(options), resolve=True).get("model", {})
