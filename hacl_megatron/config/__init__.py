"""What a run is asked to do: flags, YAML files, the sizes of the model, and every check across them.

flags.py         one dataclass of flags per concern       parser.py    flags and YAML entries -> those dataclasses
architecture.py  sizes of the model's parts               records.py   YAML mappings -> dataclasses, type by type
run.py           RunConfig: all of it, to and from YAML   sections.py  YAML sections handed to megatron-core
checks.py        everything that can be wrong before a GPU is touched
"""
