"""From a config to the things it names: models, examples, what training starts from."""
