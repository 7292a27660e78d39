"""Pure rules: standard library, pydantic, jinja2 and yaml only."""
