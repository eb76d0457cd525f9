"""What a user of training and sampling need not read."""
