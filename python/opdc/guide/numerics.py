""".. include:: numerics.md"""
