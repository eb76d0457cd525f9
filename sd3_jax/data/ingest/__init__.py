"""Pictures and captions of other tools, planned in parts and read as items."""
