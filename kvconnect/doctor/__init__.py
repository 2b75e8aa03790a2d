"""``kvconnect doctor`` finds what keeps KV from crossing: a machine, its software, a configuration.

A check is a function that returns findings and gets what it reads as arguments, so that tests
plant faults. It imports what it needs when it runs: nothing heavy is loaded for the others.
"""
