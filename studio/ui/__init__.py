"""The Gradio page: collect values, call a verb, show the answer."""
