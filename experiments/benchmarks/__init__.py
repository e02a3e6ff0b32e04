"""Comparisons with other libraries. README.md in this folder describes the method."""
