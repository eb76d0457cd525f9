"""Near-duplicate pictures: fingerprints, search, and the page."""
