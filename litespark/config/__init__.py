"""The run's configuration: one frozen tree of typed sections, read from one YAML file.

`schema.py` says what may be written, `presets.py` the known model shapes, `load.py` reads YAML and
`section.key=value` overrides, `validate.py` checks the whole against the number of processes.
"""

from litespark.config.load import dump_config, load_config
from litespark.config.schema import ModelConfig, RunConfig
from litespark.config.validate import check_config, validate

__all__ = ["ModelConfig", "RunConfig", "check_config", "dump_config", "load_config", "validate"]
