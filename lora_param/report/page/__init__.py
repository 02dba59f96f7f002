"""`Stats` as one HTML page: Jinja2 templates, and what is drawn into them by Matplotlib."""
