"""Conversation templates (`--version`), one file each: how a dialogue becomes text, and what of it is trained on.

A new one is a file beside `v1.py` that makes a `Template`, and its name in the loop below; training, preparation,
plans, tools and evaluation then know it. It must say

* `name` and `title`, for `--version` and for tables of results;
* `pieces`: a dialogue, whose turns are already checked, as texts and token ids in their order, its BOS included if it
  has one, each marked whether it is a target. Every text is tokenized on its own, in training and where lengths are
  counted in bulk. What precedes an image in a first question is read off the pieces, too.

and, only where the template wants it, `find_labels` (targets that depend on the tokens of the whole), `end` (a text
ends its answers, not EOS), `needed_tokens`, `end_tokens` and `trained_tokens` (special tokens that it writes),
`first_answer_is_caption`, `shows_untagged_image` and `question_template`; see `Template`.
A dialogue that does not fit raises UnusableSample with the reason. No file here imports torch or transformers: tools
name the templates in their `--help`.
"""

from hacl_megatron.data.templates.chat import CHAT
from hacl_megatron.data.templates.chatml import CHATML
from hacl_megatron.data.templates.llama_3 import LLAMA_3
from hacl_megatron.data.templates.minigpt4 import MINIGPT4
from hacl_megatron.data.templates.mistral import MISTRAL
from hacl_megatron.data.templates.plain import PLAIN
from hacl_megatron.data.templates.template import Template, check_template, find_template, register, template_names
from hacl_megatron.data.templates.v1 import V1

__all__ = ["Template", "check_template", "find_template", "register", "template_names"]

for _template in (PLAIN, V1, MINIGPT4, CHATML, LLAMA_3, MISTRAL, CHAT):
    register(_template)
