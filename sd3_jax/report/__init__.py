"""The report as text: plots to SVG, tables and figures to one HTML page."""
