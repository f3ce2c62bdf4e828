"""EVLGen as a LAVIS plugin: `import lavis_evlgen` is all that a LAVIS user needs.

The order matters: the environment is checked before anything heavy is imported, the bridges are in
place before the first `import lavis`, and only then does the plugin register itself with LAVIS.
"""

__version__ = "0.1.0"

from lavis_evlgen.compat import environment

environment.check()

from lavis_evlgen.compat import lavis_bridge  # noqa: E402

lavis_bridge.apply()

from lavis_evlgen import plugin  # noqa: E402

__all__ = ["__version__", "environment", "lavis_bridge", "plugin"]
