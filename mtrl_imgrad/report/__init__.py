"""`mtrl-imgrad report`: run folders -> one HTML page, Markdown, CSV and figures."""
