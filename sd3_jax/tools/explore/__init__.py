"""Inside the making of one picture: what is measured, and the page."""
