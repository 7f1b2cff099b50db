""".. include:: choosing.md"""
