"""Captions become right-padded ids between a begin and an end token."""

from clip_ray.config import TextTowerConfig
from clip_ray.data.tokenizer import CaptionTokenizer, make_tokenizer

CAPTIONS = ["A large red star at the top left.", "A small blue ring in the middle."] * 20


def test_trained_tokenizer_pads_cuts_and_reloads() -> None:
    config = TextTowerConfig(context_length=6, vocab_size=400)
    tokenizer = make_tokenizer(config, CAPTIONS)
    ids, lengths = tokenizer(["red star", "a large red star at the top left of it all"])
    assert ids.shape == (2, 6)
    assert lengths.tolist()[1] == 6
    assert (ids[0, lengths[0] :] == 0).all()
    assert ids[0, lengths[0] - 1] == ids[1, 5]  # the end token survives the cut
    again = CaptionTokenizer(tokenizer.json_text, 6)
    assert (again(["red star"])[0] == ids[0]).all()
    assert again.sha256 == tokenizer.sha256
