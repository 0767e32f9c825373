"""What stands beside config.json and weights of an exported folder, for transformers of the oldest version that the
README names and of all since.

write.py           all of it                     tokenizer_files.py  the tokenizer's files, with <image> and <pad>
chat_templates.py  Jinja templates of dialogues  generation.py       generation_config.json
"""
