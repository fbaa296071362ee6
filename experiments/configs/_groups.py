"""Groups of a config from their fields, see `nl_jax.train.config`."""

import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from nl_jax import fields

ConfigDict = config_dict.ConfigDict


def filled(known: Mapping[str, fields.Field], **says: Any) -> ConfigDict:
  """A group: what a preset says, and the defaults of the rest.

  Args:
    known: the fields of the group, of `config.table` or `fields.of`.
    says: values by name; of a group in it a mapping of what differs.

  Raises:
    ValueError: a name that is not a field of the group, or none for a field
      without a default.
  """
  group = ConfigDict()
  for name, field in known.items():
    if field.group:
      group[name] = filled(fields.of(field.group), **says.pop(name, {}))
      continue
    value = says.pop(name, field.default)
    if value is inspect.Parameter.empty:
      raise ValueError(f"a config must say {name}")
    group[name] = value
  if says:
    raise ValueError(
      f"no field {', '.join(says)}; there are {', '.join(known)}"
    )
  return group
