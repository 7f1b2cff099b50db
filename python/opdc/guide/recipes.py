""".. include:: recipes.md"""
