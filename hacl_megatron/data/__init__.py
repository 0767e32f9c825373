"""LLaVA data, from files to packed micro-batches. First read manifest.py, encoding.py and packing.py, then loader.py.

    what there is            prepare/        JSON -> one Arrow file, images -> tar shards
                             manifest.py     files and prepared folders as one numbered list of samples
    which comes next         mixing.py       the order of one epoch: shuffled, weighted, in blocks, by modality
                             sampler.py      epochs -> global batches, read on from any place
    samples as tokens        tokenizer.py    LLaMA tokenizers, as LLaVA-1.5 was trained with them
                             templates/      conversation templates, a file each
                             encoding.py     a sample -> segments of tokens and targets
                             assignment.py   which rank and micro-batch runs which sample
    images as pixels         store.py        bytes by name from a folder, by place from tar shards
                             read_ahead.py   files read by threads before they are needed
                             images.py       bytes -> normalised pixels, by Pillow or by dali.py
    batches                  packing.py      segments and images -> PackedBatch
                             loader.py       all of the above, steps ahead, in the background

show.py tells a page what the model sees of a sample; append_only.py is a file of lines that no kill spoils.
"""
