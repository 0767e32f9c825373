"""Hallucinated captions for LLaVA files (tools/generate_hallucinations.py). First read run.py, then rules.py or ask.py.

run.py     a file in, the same file with captions out     files.py      records in and out, streaming
                                                          report.py     what was changed, and how much, as a page
--method rules: offline                                   --method llm: from any OpenAI-compatible endpoint
by_rules.py   a file's captions, in several processes     ask.py        requests, paced, until answers are good
rules.py      one caption: edits drawn and written        prompt.py     what is asked
units.py      what could be changed in it ...             checks.py     why an answer is refused
relations.py  ... its counts and spatial relations        answers.py    answers on disk, none paid for twice
lexicon.py    word lists (words/) as tables
text.py       tokens, articles, plurals, case
"""
