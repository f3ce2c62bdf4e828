"""Objects of other packages get the defaults of a base class of ours once, where they come in."""


def take_over(adapter, contract: type, source):
    """Set on `adapter`, a `contract`, those of the contract's public names that `source` has."""
    for name in {**vars(contract), **contract.__annotations__}:
        if not name.startswith("_") and hasattr(source, name):
            setattr(adapter, name, getattr(source, name))
