"""Celery tasks and the processes that they start. Never imports the page."""
