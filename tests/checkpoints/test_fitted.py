"""A base that is given room for new tokens."""

import dataclasses

import numpy as np

from jaxlora.checkpoints.fitted import resized_tables
from jaxlora.checkpoints.load import read_model_config


def test_new_rows_are_the_same_each_time_and_others_in_every_table(tiny_llama):
    folder = tiny_llama(tie_word_embeddings=False)
    stored, _ = read_model_config(folder)
    cfg = dataclasses.replace(stored, vocab_size=stored.vocab_size + 3)
    one, again = (resized_tables(folder, stored, cfg, mean_resizing=False) for _ in range(2))
    embedding, head = one["embed/embedding"], one["lm_head/kernel"].T
    assert embedding.shape == head.shape
    np.testing.assert_array_equal(embedding, again["embed/embedding"])
    new = np.stack([table[stored.vocab_size :] for table in (embedding, head)])
    assert np.abs(new[0] - new[1]).max() > 0.1 * new.std()
    # Fresh weights of the model: a normal distribution around zero, of its own width.
    assert 0.7 < new.std() / cfg.init_std < 1.3
