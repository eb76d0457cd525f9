"""What shards hold: a survey, and the page."""
