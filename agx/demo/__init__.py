"""`agx demo`: the whole flow on one machine, and a check that what was measured is what ran.

scenes -> scripted or real model -> agents -> traffic (runs here, or in a doomed process) -> ledger -> comparison
                                                 |                                                        ^
                                                 listener -> screen              sidecar's /metrics ------+
"""
