""".. include:: migration.md"""
