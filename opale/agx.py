"""`opale.agx`: the older name of the module `agx`; importing it gives the very same module object."""

import sys

import agx
from agx import *  # noqa: F403 - for type checkers, which do not see what follows

__all__ = []
__all__ += agx.__all__

sys.modules[__name__] = agx
