"""Which channels of a network belong together, and how to remove some of them exactly."""

import lazy_loader

# what modules of this name had before they were rooms
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__, submod_attrs={"grouping": ["ChannelGroup", "ChannelGroups", "Unprunable", "channel_groups"]}
)
