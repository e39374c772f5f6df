"""`opale.agx`: the older name of the module `agx`; importing it gives the very same module object."""

import sys

import agx

sys.modules[__name__] = agx
