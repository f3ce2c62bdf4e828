"""What happens when LAVIS is imported, by anybody: its bridges are applied, and EVLGen registers itself with it.

LAVIS with all that it imports takes many seconds, so `import lavis_evlgen` does not import it. A finder in front of
`sys.meta_path` sees the first `import lavis` instead. A plugin that imported our modules at once would meet those
half executed that have just asked for LAVIS (`from lavis_evlgen.datasets import ...` as the first line of a script),
so registration waits until the outermost import of this package has finished.

Standard library only: `evlgen --help` imports this.
"""

import importlib
import sys
from collections.abc import Callable

PACKAGE = __name__.partition(".")[0]


class _Finder:
    """Finds nothing itself: puts `_Import` around what the other finders find for LAVIS and for this package."""

    def __init__(self, register: Callable[[], object]):
        self.register = register
        self.pending = False  # LAVIS is imported and EVLGen not registered yet
        self.depth = 0  # modules of this package that are being executed

    def find_spec(self, name, path=None, target=None):
        if name != "lavis" and not name.startswith(f"{PACKAGE}."):
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:  # None: a folder without __init__.py
                    self._wrap(spec.loader, self._execute_lavis if name == "lavis" else self._execute_own)
                return spec
        return None

    @staticmethod
    def _wrap(loader, execute):
        """The loader keeps its class, which others ask (pickle, inspect, importlib.resources)."""
        original = loader.exec_module
        loader.exec_module = lambda module: execute(original, module)

    def _execute_lavis(self, original, module):
        bridge = importlib.import_module(f"{PACKAGE}.compat.lavis_bridge")
        with bridge.without_heavy_imports(bridge.BY_NAME):  # which are transformers'
            bridge.before_import()
        with bridge.without_import_warnings(), bridge.without_heavy_imports():
            original(module)
        bridge.after_import()
        self.pending = True
        self._register_when_outermost()

    def _execute_own(self, original, module):
        self.depth += 1
        try:
            original(module)
        finally:
            self.depth -= 1
        self._register_when_outermost()

    def _register_when_outermost(self):
        if self.pending and not self.depth:
            self.pending = False
            self.register()


def watch(register: Callable[[], object]) -> None:
    """Bridge LAVIS and call `register` when LAVIS is imported: at once where it already is."""
    if "lavis" in sys.modules:
        bridge = importlib.import_module(f"{PACKAGE}.compat.lavis_bridge")
        bridge.before_import()
        bridge.after_import()
        register()
    else:
        sys.meta_path.insert(0, _Finder(register))
