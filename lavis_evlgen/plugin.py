"""Registers EVLGen with LAVIS: models, tasks, data sets, processors, runner, schedule. Importing is all it takes."""

import lavis_evlgen.datasets  # noqa: F401
import lavis_evlgen.models.blip2_stage1  # noqa: F401
import lavis_evlgen.models.evlgen  # noqa: F401
import lavis_evlgen.models.evlgen_video  # noqa: F401
import lavis_evlgen.processors  # noqa: F401
import lavis_evlgen.runners  # noqa: F401
import lavis_evlgen.tasks  # noqa: F401
from lavis_evlgen.compat import lavis_bridge

lavis_bridge.refresh_model_zoo()
