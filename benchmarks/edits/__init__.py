"""Whole edits: time, memory and quality of the methods, beside their plain references."""
