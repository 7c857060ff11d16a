"""Addresses, interfaces and hosts, and how each launcher is started.

All but `_network`, `_agent` and `_board` is standard library only and imports nothing else of the package: this folder
can be run as it is, without torch; see `__main__.py`.
"""
