"""Named configs: one file each, `get_config(arg="") -> ConfigDict`."""
