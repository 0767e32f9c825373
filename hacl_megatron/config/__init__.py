"""What a run is asked to do: flags, YAML files, the sizes of the model, and every check. First flags.py, then run.py.

flags.py         one dataclass of flags per concern       architecture.py  sizes of the model's parts
parser.py        flags and YAML entries -> those          families/        kinds of language models, a file each
help.py          how `--help` reads                       towers/          kinds of vision towers, a file each
names.py         what a misspelt name meant               lora.py          LoRA, and what it may stand beside
run.py           RunConfig: all of it, to and from YAML   layout.py        how processes and samples are divided
sections.py      YAML sections handed to megatron-core    console.py       one line to the user from all processes
typed_yaml.py    YAML mappings -> dataclasses, by type    checks/          everything that can be wrong before a GPU
yaml_text.py     YAML text in and out, its traps closed                    is touched: flags, sizes, files
                                                 files/           a user's files: regular ones only
"""
