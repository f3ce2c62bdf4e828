"""LAVIS runners."""

import lavis_evlgen.runners.runner_evlgen  # noqa: F401
import lavis_evlgen.runners.schedule  # noqa: F401
