import numpy as np
import pytest
from fairseq.data import LanguagePairDataset, TokenBlockDataset, data_utils, language_pair_dataset, token_block_dataset

from admin_fairseq.old_numpy import OldNumpy


@pytest.mark.parametrize("module", [data_utils, language_pair_dataset, token_block_dataset])
def test_fairseq_finds_the_names_that_numpy_has_dropped(module):
    assert isinstance(module.np, OldNumpy)
    assert module.np.zeros is np.zeros
    assert module.np.compat.long is module.np.int is int


def test_what_fairseq_computes_with_them():
    sizes = np.array([3, 5, 8, 9])
    assert data_utils.get_buckets(sizes, 2).tolist() == [5, 9]  # by interpolation="lower"
    sentences = [*map(np.ones, sizes)]
    blocks = TokenBlockDataset(sentences, sizes, None, pad=1, eos=2, break_mode="eos")
    assert blocks.sizes.tolist() == sizes.tolist()
    assert LanguagePairDataset(sentences, sizes, Symbols(), num_buckets=2).buckets == [(None, 5), (None, 9)]


class Symbols:
    pad = eos = bos = unk = staticmethod(lambda: 1)


def test_numpy_itself_stays_as_it_is():
    with pytest.raises(AttributeError):
        np.int  # noqa: B018
