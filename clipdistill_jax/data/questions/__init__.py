"""Questions about images: from the records of VCR, SNLI-VE and VQA to batches of fixed shapes.

An item is one question with its choices (`items`). `prepare` stores images, region features and the list of
items; `pipeline` feeds them in the shapes that `buckets` chooses, with the texts laid out by `layout`.
"""
