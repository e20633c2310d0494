from netclone.tracing import trace, position
from netclone.capturing import capture
from netclone.channels import channel_groups
from netclone.localizing import localize
from netclone.extracting import extract
__version__ = "0.1.0"
