"""A word's vectors in the place of its token, for the host's own tokenizers and encoders."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError, StorageError, UnsupportedModelError
from safetensors.torch import save_file

from ..small_clips import FAMILIES, WIDTH

pytestmark = pytest.mark.usefixtures("comfyui")

KEYS = {
    "SD1.5": {"clip_l"}, "SDXL": {"clip_l", "clip_g"}, "SD3.5": {"clip_l", "clip_g"}, "FLUX.1": {"clip_l", "t5xxl"},
    "Z-Image": {"qwen3_4b"}, "Qwen-Image": {"qwen25_7b"}, "Wan": {"umt5xxl"}, "Lumina 2": {"gemma2_2b"},
    "OmniGen2": {"qwen25_3b"}, "FLUX.2 Klein": {"qwen3_4b"}, "Chroma": {"t5xxl"}, "HunyuanVideo": {"clip_l", "llama"},
    "FLUX.2": {"mistral3_24b"}, "Krea 2": {"qwen3vl_4b"}, "LTX-2": {"gemma3_12b"},
}  # fmt: skip
CAPTIONS = ("a photo of {word} on the grass", "{word} on the grass", "a {word}, left", "a red {word}")


@pytest.fixture
def words(comfyui):
    from blockskip_pack.blockskip_core.hosts.words import captions, encoders

    return captions, encoders


def learned(vectors):
    generator = torch.Generator().manual_seed(1)
    return {key: 0.05 * torch.randn(tensor.shape, generator=generator) for key, tensor in vectors.items()}


def assert_equal(first, second):
    """Compare two CONDITIONINGs bit for bit."""
    assert len(first) == len(second)
    for (tensor, settings), (other, others) in zip(first, second, strict=True):
        assert torch.equal(tensor, other)
        assert settings.keys() == others.keys()
        for name, value in settings.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("word", ["dog", "a friendly dog"])
def test_vectors_in_a_caption_are_what_a_file_with_them_gives(words, clip_of, embeddings, family, word):
    captions, encoders = words
    clip = clip_of(family)
    before = {name: tensor.clone() for name, tensor in clip.cond_stage_model.state_dict().items()}
    tokenizers = dict(vars(clip.tokenizer))
    clip.tokenize("")  # LTX-2's notes its template
    settings = {name: dict(vars(each)) for name, each in encoders.tokenizers_of(clip).items()}
    parts, vectors = encoders.known_word(clip, word)
    assert {part.name for part in parts} == KEYS[family]
    assert {part.width for part in parts} == {WIDTH}
    mine = learned(vectors)
    texts = [" " * (family == "FLUX.2") + caption for caption in CAPTIONS]  # its template ends without a blank
    found = captions.WordCaptions(clip, texts, parts)
    save_file(mine, embeddings / "my-word_1.safetensors")
    taking = encoders.accepting_embeddings(clip, [str(embeddings)])
    for number, caption in enumerate(texts):
        ours = found.clip.encode_from_tokens_scheduled(found.tokens(number, mine))
        theirs = taking.encode_from_tokens_scheduled(taking.tokenize(caption.replace("{word}", "embedding:my-word_1")))
        assert_equal(ours, theirs)
        if encoders.takes_embeddings(clip):
            assert_equal(ours, clip.encode_from_tokens_scheduled(
                clip.tokenize(caption.replace("{word}", "embedding:my-word_1"))
            ))  # fmt: skip
        with pytest.raises(AssertionError):
            assert_equal(ours, found.clip.encode_from_tokens_scheduled(found.tokens(number, vectors)))
    assert vars(clip.tokenizer) == tokenizers
    assert {name: dict(vars(each)) for name, each in encoders.tokenizers_of(clip).items()} == settings
    for name, tensor in clip.cond_stage_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_the_vectors_of_a_known_word_change_nothing(words, clip_of, family):
    """CLIP's tokenizer does not join a word with the blank before it, so the tokens are the same too."""
    captions, encoders = words
    clip = clip_of(family)
    parts, vectors = encoders.known_word(clip, "dog")
    found = captions.WordCaptions(clip, ["a photo of {word} on grass"], parts)
    ours = found.clip.encode_from_tokens_scheduled(found.tokens(0, vectors))
    assert_equal(ours, clip.encode_from_tokens_scheduled(clip.tokenize("a photo of dog on grass")))


def test_the_size_of_a_word_is_that_of_the_vocabulary(words, clip_of):
    clip = clip_of("SD1.5")
    parts, _ = words[1].known_word(clip, "dog")
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    assert parts[0].size == pytest.approx(table.square().mean().sqrt().item(), rel=0.02)


def test_other_embeddings_in_a_caption_stay(words, clip_of, embeddings):
    captions, encoders = words
    clip = clip_of("SD1.5")
    parts, vectors = encoders.known_word(clip, "dog")
    other = {"clip_l": torch.full((1, WIDTH), 0.3)}
    save_file(other, embeddings / "other.safetensors")
    found = captions.WordCaptions(clip, ["embedding:other and {word}"], parts)
    tokens = found.tokens(0, learned(vectors))
    tensors = [token for token, _ in tokens["l"][0] if isinstance(token, torch.Tensor)]
    assert len(tensors) == 2
    assert torch.equal(tensors[0], other["clip_l"][0])
    assert torch.equal(tensors[1], learned(vectors)["clip_l"][0])


def test_a_weight_in_a_caption_stays(words, clip_of):
    captions, encoders = words
    clip = clip_of("SD1.5")
    parts, vectors = encoders.known_word(clip, "dog")
    tokens = captions.WordCaptions(clip, ["a ({word}:1.3) on grass"], parts).tokens(0, vectors)
    assert [weight for token, weight in tokens["l"][0] if isinstance(token, torch.Tensor)] == [1.3]


@pytest.mark.parametrize("caption", ["a photo", "a photo of{word}", "{word}s on grass", 'a "{word}"'])
def test_a_caption_in_which_the_word_is_not_found_is_refused(words, clip_of, caption):
    captions, encoders = words
    clip = clip_of("SD1.5")
    with pytest.raises(InvalidInputError, match="Every caption needs|finds 0 of 1 vectors"):
        captions.WordCaptions(clip, [caption], encoders.known_word(clip, "dog")[0])


def test_flux2_finds_a_word_at_the_beginning_only_after_a_blank(words, clip_of):
    captions, encoders = words
    clip = clip_of("FLUX.2")
    parts = encoders.known_word(clip, "dog")[0]
    with pytest.raises(InvalidInputError, match=r"finds 0 of 3 vectors .* Put blanks around {word}"):
        captions.WordCaptions(clip, ["{word} on the grass"], parts)
    captions.WordCaptions(clip, [" {word} on the grass"], parts)


@pytest.mark.parametrize("word", ["", "  ", "dog " * 40])
def test_a_known_word_without_tokens_or_with_too_many_is_refused(words, clip_of, word):
    with pytest.raises(InvalidInputError, match="like_word must be a word or a few"):
        words[1].known_word(clip_of("SD1.5"), word)


def test_a_clip_without_such_tokenizers_is_refused(words, clip_of):
    clip = clip_of("SD1.5").clone()
    clip.tokenizer = object.__new__(type("OtherTokenizer", (), {}))
    with pytest.raises(UnsupportedModelError, match="got a OtherTokenizer"):
        words[1].known_word(clip, "dog")


def test_a_temporary_folder_that_cannot_be_made_is_one_sentence(words, clip_of, tmp_path, monkeypatch):
    import folder_paths

    captions, encoders = words
    clip = clip_of("SD1.5")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "file" / "temp"))
    with pytest.raises(StorageError, match="temporary folder .* cannot be written"):
        captions.WordCaptions(clip, ["a {word}"], encoders.known_word(clip, "dog")[0])


def test_nothing_is_left_in_the_temporary_folder(words, clip_of, tmp_path):
    captions, encoders = words
    clip = clip_of("SD1.5")
    captions.WordCaptions(clip, ["a {word}"], encoders.known_word(clip, "dog")[0])
    assert list((tmp_path / "temp").rglob("*")) == []


def test_a_clip_that_takes_embeddings_keeps_its_own_folders(words, clip_of, embeddings):
    encoders = words[1]
    clip = clip_of("Qwen-Image")
    assert not encoders.takes_embeddings(clip)
    taking = encoders.accepting_embeddings(clip, ["here"])
    assert encoders.takes_embeddings(taking)
    assert not encoders.takes_embeddings(clip)
    assert taking.tokenizer.qwen25_7b.embedding_directory == ["here"]
    other = encoders.accepting_embeddings(clip_of("SD1.5"), ["here"], before=["first"])
    assert other.tokenizer.clip_l.embedding_directory == ["first", str(embeddings)]
