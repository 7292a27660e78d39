"""Rows and queries. Functions take a Session; no rules live here."""
