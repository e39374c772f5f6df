"""`agx demo`: the whole flow on one machine, and a check that what was measured is what ran.

scenes -> scripted model | real model -> agents -> traffic (agx.run) -> ledger
                                                      |                   |
                             watcher (agx.listen) -> screen           comparison <- sidecar's /metrics
"""
