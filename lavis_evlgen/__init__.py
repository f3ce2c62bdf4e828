"""EVLGen as a LAVIS plugin: `import lavis_evlgen` is all that a LAVIS user needs.

The import itself is light: it checks the versions of what is installed, and LAVIS is not imported. When something
imports LAVIS, its bridges are applied and EVLGen registers its models, tasks, data sets, processors and runner there.
"""

__version__ = "0.1.0"

from lavis_evlgen.compat import environment, lavis_import

environment.check()


def _register():
    from lavis_evlgen import plugin  # noqa: F401


lavis_import.watch(_register)
