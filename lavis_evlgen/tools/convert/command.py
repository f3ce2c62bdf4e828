"""`evlgen convert`: a released checkpoint -> a bundle, or back."""

from __future__ import annotations

from lavis.common.registry import registry

from lavis_evlgen.tools.convert import from_released, to_released
from lavis_evlgen.tools.model_options import model_options
from lavis_evlgen.weights import bundle


def main(args) -> int:
    """Released checkpoint -> bundle, or back; every key is reported."""
    cls = registry.get_model_class("evlgen")
    if args.to == "released":
        lines = to_released.write_released(args.source, args.out, cls)
    else:
        options = model_options(args.options)
        weights, config, extra, report = from_released.from_released(args.source, cls, options, args.allow_unknown)
        bundle.write_bundle(args.out, weights, config, extra=extra)
        lines = report.lines()
    print("\n".join([*lines, f"written: {args.out}"]))
    return 0
