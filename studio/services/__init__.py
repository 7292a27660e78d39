"""Verbs of a user: check the rule, write the row, commit, ring the bell."""
