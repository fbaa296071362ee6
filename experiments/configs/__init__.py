"""Named configs: one file a family, `get_config(arg) -> ConfigDict`."""
