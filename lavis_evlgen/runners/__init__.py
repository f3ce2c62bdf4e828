"""LAVIS runners."""

import lavis_evlgen.runners.optim  # noqa: F401
import lavis_evlgen.runners.trainer  # noqa: F401
