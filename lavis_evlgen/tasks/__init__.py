"""LAVIS tasks: what is done with a model and a data set at evaluation."""

import lavis_evlgen.tasks.blip2_stage1  # noqa: F401
import lavis_evlgen.tasks.captioning  # noqa: F401
import lavis_evlgen.tasks.conversation  # noqa: F401
import lavis_evlgen.tasks.scst  # noqa: F401
import lavis_evlgen.tasks.vqa  # noqa: F401
