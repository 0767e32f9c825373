"""LLaVA JSON made ready for training, by tools/prepare_data.py or at its first use. First llava_json.py, then parts.py.

llava_json.py      JSON files -> checked records          arrow_manifest.py  records as one Arrow file, mapped by all
parts.py           records -> parts -> that file;         shards.py          images -> tar shards with known places
                   goes on where it was killed            run.py             all of it: one prepared folder, a report
token_lengths.py   rows that samples will take            cache.py           raw JSON as --data-path, prepared once
dialogue_json.py   turns as different users write them
records/           what one says: keys, values, captions   findings.py        what to tell about a file's records
"""
