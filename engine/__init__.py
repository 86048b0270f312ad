"""What any run needs, whichever stage it is. Nothing here knows text or tells stages apart."""

import atexit
import gc

# Imports make half a million objects that stay. Python's collector of cycles would walk through
# them again and again, for a fifth of the time of all imports. It does so rarely until a command
# begins.
USUAL_THRESHOLDS = gc.get_threshold()
gc.set_threshold(10_000)


def imports_are_done():
    """Called where a command begins: what is there stays, and the collector passes it over.

    At exit it passes over all objects: to look at them would take most of a second.
    """
    gc.freeze()
    gc.set_threshold(*USUAL_THRESHOLDS)
    atexit.register(gc.freeze)
