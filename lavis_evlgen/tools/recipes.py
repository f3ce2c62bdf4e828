"""`evlgen recipes`: the run configs that come with the package, which every command takes by name."""

from __future__ import annotations

from lavis_evlgen.config.recipes import about, recipe, recipes


def main(args) -> int:
    """List names and what each recipe is; of one, print its text, to be saved and changed."""
    if args.name is not None:
        print(recipe(args.name).read_text(encoding="utf-8"), end="")
        return 0
    known = recipes()
    width = max(map(len, known))
    for name, path in known.items():
        print(f"{name:<{width}}  {about(path)}")
    return 0
