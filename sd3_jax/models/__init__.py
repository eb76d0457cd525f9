"""Every nn.Module lives here; none knows of a config, a file or a device."""
