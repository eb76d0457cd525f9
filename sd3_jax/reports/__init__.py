"""The parts of HTML pages: plots as SVG, tables, figures."""
