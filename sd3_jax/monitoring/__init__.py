"""What a run says of itself: metrics, their writers, progress and goodput."""
