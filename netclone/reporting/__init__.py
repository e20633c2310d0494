"""Drawings of a grafted network: the page of a report, and plots."""

import lazy_loader

# what modules of this name had before they were rooms
__getattr__, __dir__, _ = lazy_loader.attach(__name__, submod_attrs={"page": ["Report", "report"]})
