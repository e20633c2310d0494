"""A clone as a module: cut out of the source, fitted, grafted onto a target, verified, and removed again."""

import lazy_loader

# what modules of this name had before they were rooms
__getattr__, __dir__, _ = lazy_loader.attach(__name__, submod_attrs={"method": ["clone"]})
